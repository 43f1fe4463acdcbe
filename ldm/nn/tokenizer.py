"""CLIP's byte-pair tokenizer: captions to token ids."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Encoding
from torch import Tensor

CLIP_BPE = Path(__file__).parents[1] / "assets" / "clip_bpe"


class Tokenizer:
    """Captions to tokens (b, context): begin, the caption's, end, then `pad` (SD 1.x: 49407, SD 2.x: 0).

    The vocabulary is CLIP's own unless the two files of another are given.
    """

    def __init__(
        self, vocab: Path | None = None, merges: Path | None = None, context: int = 77, pad: int = 49407
    ) -> None:
        from transformers.models.clip.tokenization_clip import CLIPTokenizer  # here: the import takes 0.7 s

        if (vocab is None) != (merges is None):
            raise ValueError("A tokenizer needs both files, vocab and merges, or neither for CLIP's own vocabulary.")
        if context < 3:
            raise ValueError(f"The context is {context} tokens, but begin, end and a word need at least 3.")
        files = vocab or CLIP_BPE / "vocab.json", merges or CLIP_BPE / "merges.txt"
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"There is no tokenizer file {file}: give the vocab.json and merges.txt of a CLIP model."
                )
        clip = CLIPTokenizer(vocab=str(files[0]), merges=str(files[1]), model_max_length=context)
        self.context = context
        self.pad = pad
        self.begin, self.end = clip.bos_token_id, clip.eos_token_id
        self._bpe = clip.backend_tokenizer
        self._added: dict[int, list[int]] = {}  # the id of an added word → the tokens that stand for it

    def check_new(self, word: str) -> None:
        """Raises ValueError for a word that cannot be added, because it is a token already or is none."""
        if not word.strip() or word.strip() != word:
            raise ValueError(f"the new token is {word!r}, but must be a word without spaces around it")
        if any(self._bpe.token_to_id(one) is not None for one in (word, word.lower(), f"{word.lower()}</w>")):
            raise ValueError(f"{word!r} is a token already: give the new one another name")

    def add(self, word: str, ids: list[int]) -> None:
        """Makes a word, whatever its case, stand for these tokens. One of letters is not found within longer words."""
        self.check_new(word)
        whole = word[0].isalnum() and word[-1].isalnum()
        self._bpe.add_tokens([AddedToken(word.lower(), single_word=whole, normalized=True)])
        if (own := self._bpe.token_to_id(word.lower())) is None:
            raise ValueError(f"the tokenizer takes no new token {word!r}: give it another name")
        self._added[own] = ids

    def without_added(self, caption: str) -> str:
        """The caption with spaces in the places of added words."""
        encoding = self._bpe.encode(caption, add_special_tokens=False)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._added:
                caption = caption[:begin] + " " * (end - begin) + caption[end:]
        return caption

    def _ids(self, encoding: Encoding) -> list[int]:
        """Its tokens, those of added words in their places."""
        return [token for own in encoding.ids for token in self._added.get(own, [own])]

    def __call__(self, captions: list[str], chunks: int = 1) -> Tensor:
        """Tokens int64 (b, chunks · context): a caption goes on from chunk to chunk, each with its own begin and end.

        What does not fit is left out, see `cut`.
        """
        tokens = torch.full((len(captions), chunks, self.context), self.pad)
        room = self.context - 2
        for rows, encoding in zip(tokens, self._bpe.encode_batch(captions, add_special_tokens=False), strict=True):
            own = self._ids(encoding)
            for chunk, row in enumerate(rows):
                ids = [self.begin, *own[chunk * room : (chunk + 1) * room], self.end]
                row[: len(ids)] = torch.tensor(ids)
        return tokens.flatten(1)

    def cut(self, caption: str, chunks: int = 1) -> str:
        """The end of the caption that does not fit into so many chunks, '' if all of it does."""
        encoding = self._bpe.encode(caption, add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        begins = [begin for own, (begin, _) in pairs for _ in self._added.get(own, [own])]
        left_out = begins[chunks * (self.context - 2) :]
        return caption[left_out[0] :] if left_out else ""

    def words(self, ids: list[int]) -> list[str]:
        """What each token stands for; part of a character reads '\N{REPLACEMENT CHARACTER}'."""
        added = {token: self._bpe.id_to_token(word) for word, tokens in self._added.items() for token in tokens}
        texts = (added.get(token) or self._bpe.decode([token], skip_special_tokens=False) for token in ids)
        return [text.removesuffix("</w>").strip() for text in texts]
