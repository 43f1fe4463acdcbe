import json
import pickle
import random
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import torch

from ldm.nn.tokenizer import CLIP_BPE, Tokenizer

CAPTIONS = [
    "a photo of a cat",
    "",
    "   \t\n ",
    "A  Photo\n of\ta   CAT  ",
    "it's the dog's, isn't it? they're sure we've, I'm, you'll, he'd; 'sup",
    'she said "hello", then ‘goodbye’ – and “left”…',
    "&lt;b&gt;bold &amp; brave&lt;/b&gt; &#39;x&#39; &quot;q&quot;",
    "3.14159 and 1,000,000 or 2nd ½ ² ٣ Ⅷ 2024-01-02T03:04",
    "café naïve Ångström ÉCOLE ŒUVRE İstanbul Straße ΟΔΟΣ",
    "cafe\u0301 A\u030angstrom n\u0303andu\u0301",
    "猫の写真 一只猫 고양이 사진 ภาพแมว बिल्ली की तस्वीर صورة قطة",
    "family 👨‍👩‍👧 thumbs 👍🏽 flag 🇫🇷 heart ❤️ grin 😀😀😀",
    "trending on artstation, 8k, (masterpiece:1.2), [[sharp]] {x} <lora:foo> |a|b|",
    "http://example.com/a_b?c=d&e=f#g user@example.org #tag @name $5 50% a+b=c ~/x \\n",
    "zero\u200bwidth non\u00a0breaking \u3000wide soft\u00adhyphen \ufeffmark \ufffd",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﬁne ﷺ",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis " * 3,
    "supercalifragilistic" * 40,
    "!" * 300,
    " ".join(f"word{i}" for i in range(200)),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@cache
def byte_letters() -> dict[int, str]:
    """The letter that represents each byte: itself if printable, otherwise the next one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@cache
def vocabulary() -> tuple[dict[str, int], dict[tuple[str, ...], int]]:
    merges = (CLIP_BPE / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    return json.loads((CLIP_BPE / "vocab.json").read_text()), {tuple(m.split(" ")): i for i, m in enumerate(merges)}


def merge(symbols: list[str], ranks: dict[tuple[str, ...], int]) -> list[str]:
    """Applies the merges of byte-pair encoding (Sennrich et al. 2016, algorithm 1), earliest pair first."""
    while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        joined: list[str] = []
        for symbol in symbols:
            if joined and (joined[-1], symbol) == best:
                joined[-1] += symbol
            else:
                joined.append(symbol)
        symbols = joined
    return symbols


def normal(caption: str) -> str:
    """Normalises white space and lower-cases each letter alone, since CLIP lacks the final-sigma rule of str.lower."""
    return "".join(letter.lower() for letter in regex.sub(r"\s+", " ", unicodedata.normalize("NFC", caption)))


@cache
def ids_of(word: str) -> list[int]:
    vocab, ranks = vocabulary()
    symbols = [byte_letters()[byte] for byte in word.encode()]
    symbols[-1] += "</w>"
    return [vocab[symbol] for symbol in merge(symbols, ranks)]


def reference(caption: str) -> list[int]:
    """An independent encoder written from the papers: the ids of a caption without begin and end."""
    words = regex.findall(r"'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", normal(caption))
    return [token for word in words for token in ids_of(word)]


SCRIPTS = {  # ranges of code points that have long been in Unicode
    "accents": (0xC0, 0x24F),
    "combining": (0x300, 0x36F),
    "greek and cyrillic": (0x391, 0x481),
    "hebrew and arabic": (0x5D0, 0x64A),
    "devanagari": (0x904, 0x939),
    "thai": (0xE01, 0xE30),
    "kana": (0x3041, 0x30FE),
    "hanzi": (0x4E00, 0x9FA5),
    "hangul": (0xAC00, 0xD7A3),
    "symbols": (0x2190, 0x27BF),
    "emoji": (0x1F300, 0x1F64F),
    "punctuation": (0x21, 0x2F),
    "digits": (0x30, 0x39),
}


def captions(count: int) -> list[str]:
    """English mixed with other scripts, from empty captions to many times the context."""
    chance = random.Random(0)
    english = [word.removesuffix("</w>") for word in vocabulary()[0] if word.removesuffix("</w>").isascii()][:20000]

    def word() -> str:
        if chance.random() < 0.6:
            return chance.choice([str.lower, str.upper, str.title])(chance.choice(english))
        letters = [chr(chance.randint(*chance.choice(list(SCRIPTS.values())))) for _ in range(chance.randint(1, 5))]
        return chance.choice(["", "\u200d", "\ufe0f"]).join(letters)

    lengths = [chance.choice([0, 1, 3, 8, 16]) if chance.random() < 0.98 else 150 for _ in range(count)]
    return [chance.choice([" ", "  ", "", ", ", "\n", "\u3000"]).join(word() for _ in range(n)) for n in lengths]


def test_a_photo_of_a_cat_has_the_published_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer(["a photo of a cat"])[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize("caption", CAPTIONS, ids=lambda caption: ascii(caption[:12]))
def test_an_independent_byte_pair_encoder_agrees(tokenizer: Tokenizer, caption: str) -> None:
    ids = [49406, *reference(caption)[:75], 49407]
    assert tokenizer([caption])[0].tolist() == ids + [49407] * (77 - len(ids))


def test_words_across_the_vocabulary_match_the_independent_encoder(tokenizer: Tokenizer) -> None:
    words = tokenizer.words(list(range(0, 49406, 31)))
    tokens = tokenizer(words)
    for word, row in zip(words, tokens, strict=True):
        ids = reference(word)
        assert row[1 : len(ids) + 2].tolist() == [*ids, 49407]


def test_ten_thousand_captions_match_the_independent_encoder(tokenizer: Tokenizer) -> None:
    texts = captions(10_000)
    for text, row in zip(texts, tokenizer(texts).tolist(), strict=True):
        ids = [49406, *reference(text)[:75], 49407]
        assert row == ids + [49407] * (77 - len(ids)), ascii(text)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_long_caption_continues_in_the_next_chunk(chunks: int) -> None:
    tokenizer, caption = Tokenizer(context=5, pad=0), "a photo of a cat"
    ids = [320, 1125, 539, 320, 2368]
    expected = [[49406, *ids[:3], 49407], [49406, *ids[3:], 49407, 0], [49406, 49407, 0, 0, 0]]
    assert tokenizer([caption], chunks).view(-1, 5).tolist() == expected[:chunks]


def test_cut_returns_what_does_not_fit_into_the_chunks() -> None:
    tokenizer = Tokenizer(context=4)
    assert [tokenizer.cut("a photo of a cat", chunks) for chunks in (1, 2, 3)] == ["of a cat", "cat", ""]


def test_a_batch_equals_its_captions_tokenized_one_by_one(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(CAPTIONS)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, torch.cat([tokenizer([caption]) for caption in CAPTIONS]))


def test_an_empty_batch_keeps_its_shape(tokenizer: Tokenizer) -> None:
    assert tokenizer([]).shape == (0, 77)


def test_a_short_context_keeps_begin_and_end() -> None:
    short = Tokenizer(context=5)(["a photo of a cat"])
    assert short.tolist() == [[49406, 320, 1125, 539, 49407]]


def test_stable_diffusion_2_pads_with_zero() -> None:
    assert Tokenizer(context=6, pad=0)(["cat"]).tolist() == [[49406, 2368, 49407, 0, 0, 0]]


def test_a_caption_that_fits_exactly_is_not_cut() -> None:
    assert Tokenizer(context=7).cut("a photo of a cat") == ""


def test_the_cut_text_keeps_its_original_spelling() -> None:
    assert Tokenizer(context=5).cut("A  Photo of\ta CAT, élan!") == "a CAT, élan!"


@pytest.mark.parametrize("context", [4, 9, 77])
def test_the_text_before_the_cut_is_what_the_tokens_spell(context: int) -> None:
    tokenizer = Tokenizer(context=context)
    symbols = {token: symbol for symbol, token in vocabulary()[0].items()}
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    for caption in CAPTIONS:
        cut = tokenizer.cut(caption)
        assert caption.endswith(cut)
        ids = reference(caption)[: context - 2]
        letters = "".join(symbols[token].removesuffix("</w>") for token in ids)
        spelled = bytes(byte_of[letter] for letter in letters).decode(errors="ignore")  # may end within a character
        assert spelled == "".join(normal(caption.removesuffix(cut)).split())


def test_words_decodes_each_token(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(["a Photo of 😀 zebrafish"])[0, :8].tolist()
    assert tokenizer.words(tokens) == [
        "<|startoftext|>",
        "a",
        "photo",
        "of",
        "😀",
        "zebra",
        "fish",
        "<|endoftext|>",
    ]


def test_a_tokenizer_survives_pickling(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy(CAPTIONS), tokenizer(CAPTIONS))
    assert copy.words([2368, 49407]) == ["cat", "<|endoftext|>"]


def test_another_vocabulary_can_be_given(tmp_path: Path) -> None:
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps({"a": 0, "b</w>": 1, "ab</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}))
    merges.write_text("#version: 0.2\na b</w>\n")
    assert Tokenizer(vocab, merges, context=4, pad=0)(["ab"]).tolist() == [[3, 2, 4, 0]]


def test_a_vocabulary_without_merges_is_refused() -> None:
    with pytest.raises(ValueError, match="both files"):
        Tokenizer(vocab=CLIP_BPE / "vocab.json")


def test_a_missing_vocabulary_file_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer file .*nothing\.json"):
        Tokenizer(vocab=tmp_path / "nothing.json", merges=CLIP_BPE / "merges.txt")


def test_a_context_without_room_for_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        Tokenizer(context=2)
