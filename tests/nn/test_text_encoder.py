"""The text encoder: one tower or two, chunks, skipped layers and unknown tokens."""

import pytest
import torch

from ldm.nn.clip import TextTower
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from tests.tiny import KNOWN, randomised, tiny_text_tower

CAPTIONS = ["a red circle", "blue square on white background"]
LONG = "red blue white square circle on background a " * 3  # 24 words, more than the 14 of one chunk


def encoder() -> TextEncoder:
    return TextEncoder([tiny_text_tower()], [Tokenizer(context=16)])


def wider_tower(words: str = KNOWN) -> TextTower:
    tokens = sorted(set(Tokenizer()([words]).flatten().tolist()))
    tower = TextTower(width=24, layers=2, heads=2, context=16, token_ids=tokens)
    return randomised(tower, 5, std=1.5)  # type: ignore[return-value]


def two_towers(words: str = KNOWN) -> TextEncoder:
    return TextEncoder([tiny_text_tower(), wider_tower(words)], [Tokenizer(context=16), Tokenizer(context=16, pad=0)])


def test_one_tower_gives_its_hidden_states_bit_for_bit() -> None:
    expected = tiny_text_tower()(Tokenizer(context=16)(CAPTIONS))
    assert torch.equal(encoder().encode(CAPTIONS).get("text"), expected)


def test_encoding_tokens_equals_encoding_their_captions() -> None:
    both = two_towers()
    assert torch.equal(both.encode(both.tokenize(CAPTIONS)).get("text"), both.encode(CAPTIONS).get("text"))


def test_the_states_of_two_towers_are_concatenated_per_token() -> None:
    first = tiny_text_tower()(Tokenizer(context=16)(CAPTIONS))
    second = wider_tower()(Tokenizer(context=16, pad=0)(CAPTIONS))  # each tower with its own padding
    text = two_towers().encode(CAPTIONS).get("text")
    assert torch.equal(text, torch.cat([first, second], dim=-1))
    assert two_towers().widths == {"text": text.shape[-1]}


@pytest.mark.parametrize("make", [encoder, two_towers])
def test_each_chunk_of_a_long_caption_is_encoded_separately(make) -> None:
    text_encoder = make()
    text = text_encoder.encode([LONG], chunks=2).get("text")
    assert text.shape == (1, 2 * 16, text_encoder.widths["text"])
    parts = [tokenizer([LONG], 2).chunk(2, dim=1) for tokenizer in text_encoder.tokenizers]  # by tower, then by chunk
    alone = [text_encoder.encode(torch.cat([tower[k] for tower in parts], dim=1)).get("text") for k in range(2)]
    torch.testing.assert_close(text, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


def test_skip_skips_the_last_layers_of_every_tower() -> None:
    tower, tokenizer = wider_tower(), Tokenizer(context=16)
    text = TextEncoder([tower], [tokenizer]).encode(CAPTIONS, skip=1).get("text")
    assert torch.equal(text, tower(tokenizer(CAPTIONS), 1))
    assert not torch.allclose(text, tower(tokenizer(CAPTIONS)))


def test_skipping_all_layers_of_any_tower_is_refused() -> None:
    TextEncoder([wider_tower()], [Tokenizer(context=16)]).check_skip(1)
    with pytest.raises(ValueError, match="of 1 layers cannot skip 1 of them"):
        two_towers().check_skip(1)


def test_cut_returns_the_words_that_do_not_fit_into_the_chunks() -> None:
    words = LONG.split()
    assert encoder().cut(LONG).split() == words[14:]
    assert encoder().cut(LONG, chunks=2) == ""
    assert two_towers().cut(LONG) == encoder().cut(LONG)


def test_unknown_tokens_are_those_outside_the_vocabulary_of_the_tower() -> None:
    assert encoder().unknown_tokens("a red circle") == []
    tokens = Tokenizer(context=16)(["zebra"])[0].tolist()
    assert encoder().unknown_tokens("a red zebra") == [tokens[1]]


def test_a_token_in_the_vocabulary_of_one_of_two_towers_is_known() -> None:
    assert two_towers(KNOWN + " zebra").unknown_tokens("a red zebra") == []
    assert two_towers().unknown_tokens("a red zebra") != []


@pytest.mark.parametrize(
    ("towers", "tokenizers"),
    [
        ([], []),
        ([tiny_text_tower()], []),
        (
            [tiny_text_tower(), TextTower(width=16, layers=1, heads=2, context=24, token_ids=[1, 49406, 49407])],
            [Tokenizer(context=16), Tokenizer(context=24)],
        ),
    ],
    ids=["no tower", "no tokenizer", "different contexts"],
)
def test_towers_that_do_not_match_are_refused(towers: list[TextTower], tokenizers: list[Tokenizer]) -> None:
    with pytest.raises(ValueError, match="one or more towers of the same context, each with a tokenizer"):
        TextEncoder(towers, tokenizers)
