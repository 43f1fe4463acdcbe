"""CLIP's byte-pair tokenizer."""

import re
from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # networks without text can be used without it
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Bpe

CLIP_BPE = Path(__file__).parents[1] / "assets" / "clip_bpe"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# Special tokens, English contractions, letters, single digits, and runs of anything else (Radford et al. 2021).
WORDS = rf"{re.escape(BEGIN)}|{re.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"


class Tokenizer:
    """Maps captions to tokens (b, context): begin, the caption, end, and `pad` up to the context.

    `pad` is 49407 in SD 1.x and 0 in SD 2.x. The vocabulary is CLIP's unless the files of another one are given.
    """

    def __init__(
        self, vocab: Path | None = None, merges: Path | None = None, context: int = 77, pad: int = 49407
    ) -> None:
        if (vocab is None) != (merges is None):
            raise ValueError("a tokenizer needs both files, vocab and merges, or neither, to use CLIP's vocabulary")
        if context < 3:
            raise ValueError(
                f"the context is {context} tokens, but must be at least 3, for begin, end and one more token"
            )
        files = vocab or CLIP_BPE / "vocab.json", merges or CLIP_BPE / "merges.txt"
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"there is no tokenizer file {file}: give the vocab.json and merges.txt of a CLIP model"
                )
        self.context = context
        self.pad = pad
        # Shared with other tokenizers until a word is added.
        self._bpe = _read(*((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))
        self.begin, self.end = self._bpe.encode(BEGIN + END, add_special_tokens=False).ids
        self._added: dict[int, list[int]] = {}  # id of an added word → the tokens that replace it

    def check_new(self, word: str) -> None:
        """Raises ValueError if the word is already a token, is empty, or has spaces around it."""
        if not word.strip() or word.strip() != word:
            raise ValueError(f"the new token is {word!r}, but must be a word without spaces around it")
        if any(self._bpe.token_to_id(one) is not None for one in (word, word.lower(), f"{word.lower()}</w>")):
            raise ValueError(f"{word!r} is a token already: give the new one another name")

    def add(self, word: str, ids: list[int]) -> None:
        """Maps a word, in any case, to these tokens. Words of letters and digits do not match within longer words."""
        from tokenizers import AddedToken

        self.check_new(word)
        if not self._added:
            self._bpe = deepcopy(self._bpe)
        whole = word[0].isalnum() and word[-1].isalnum()
        self._bpe.add_tokens([AddedToken(word.lower(), single_word=whole, normalized=True)])
        if (own := self._bpe.token_to_id(word.lower())) is None:
            raise ValueError(f"the tokenizer takes no new token {word!r}: give it another name")
        self._added[own] = ids

    def without_added(self, caption: str) -> str:
        """Returns the caption with added words replaced by spaces."""
        encoding = self._bpe.encode(caption, add_special_tokens=False)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._added:
                caption = caption[:begin] + " " * (end - begin) + caption[end:]
        return caption

    def _ids(self, encoding: "Encoding") -> list[int]:
        """Returns token ids, with added words replaced by their tokens."""
        return [token for own in encoding.ids for token in self._added.get(own, [own])]

    def __call__(self, captions: list[str], chunks: int = 1) -> Tensor:
        """Returns int64 tokens (b, chunks · context); a caption continues from chunk to chunk, each with begin and end.

        A caption that does not fit is truncated; `cut` returns the rest.
        """
        tokens = torch.full((len(captions), chunks, self.context), self.pad)
        for rows, encoding in zip(tokens, self._bpe.encode_batch(captions, add_special_tokens=False), strict=True):
            own = self._ids(encoding)
            for chunk, row in enumerate(rows):
                self._fill(row, own[chunk * self.room : (chunk + 1) * self.room])
        return tokens.flatten(1)

    @property
    def room(self) -> int:
        """The number of caption tokens per chunk, without begin and end."""
        return self.context - 2

    def ids(self, text: str) -> list[int]:
        """Returns the tokens of a text of any length, without begin, end and padding."""
        return self._ids(self._bpe.encode(text, add_special_tokens=False))

    def groups(self, text: str) -> list[list[int]]:
        """Returns the tokens of `ids` as groups: those of each added word together, and all others one by one."""
        return [self._added.get(own, [own]) for own in self._bpe.encode(text, add_special_tokens=False).ids]

    def frame(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """Returns int64 tokens (chunks, context): each chunk of ids between begin and end, and padded."""
        tokens = torch.full((len(chunks), self.context), self.pad)
        for row, ids in zip(tokens, chunks, strict=True):
            self._fill(row, ids)
        return tokens

    def _fill(self, row: Tensor, ids: Sequence[int]) -> None:
        framed = [self.begin, *ids, self.end]
        row[: len(framed)] = torch.tensor(framed)

    def cut(self, caption: str, chunks: int = 1) -> str:
        """Returns the end of the caption that does not fit into this number of chunks, or "" if all of it fits."""
        encoding = self._bpe.encode(caption, add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        begins = [begin for own, (begin, _) in pairs for _ in self._added.get(own, [own])]
        left_out = begins[chunks * self.room :]
        return caption[left_out[0] :] if left_out else ""

    def words(self, ids: list[int]) -> list[str]:
        """Returns the text of each token; part of a character is decoded as '\N{REPLACEMENT CHARACTER}'."""
        added = {token: self._bpe.id_to_token(word) for word, tokens in self._added.items() for token in tokens}
        texts = (added.get(token) or self._bpe.decode([token], skip_special_tokens=False) for token in ids)
        return [text.removesuffix("</w>").strip() for text in texts]


@lru_cache(maxsize=4)
def _read(vocab: tuple[Path, int, int], merges: tuple[Path, int, int]) -> "Bpe":
    """Reads the files, each with its modification time and size, once; reading CLIP's takes 70 ms."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Bpe

    files = str(vocab[0]), str(merges[0])
    bpe = Bpe(models.BPE.from_file(*files, unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (BEGIN, END)])
    return bpe
