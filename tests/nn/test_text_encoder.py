"""Captions to conditioning: one tower or several, chunks, and what no tower reads."""

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


def test_one_tower_gives_its_states_of_the_tokens_bit_for_bit() -> None:
    expected = tiny_text_tower()(Tokenizer(context=16)(CAPTIONS))
    assert torch.equal(encoder().encode(CAPTIONS).get("text"), expected)


def test_tokens_made_elsewhere_are_encoded_as_their_captions_are() -> None:
    both = two_towers()
    assert torch.equal(both.encode(both.tokenize(CAPTIONS)).get("text"), both.encode(CAPTIONS).get("text"))


def test_the_states_of_two_towers_are_joined_token_by_token() -> None:
    first = tiny_text_tower()(Tokenizer(context=16)(CAPTIONS))
    second = wider_tower()(Tokenizer(context=16, pad=0)(CAPTIONS))  # each tower with its own padding
    text = two_towers().encode(CAPTIONS).get("text")
    assert torch.equal(text, torch.cat([first, second], dim=-1))
    assert two_towers().widths == {"text": text.shape[-1]}


@pytest.mark.parametrize("make", [encoder, two_towers])
def test_each_chunk_of_a_long_caption_is_encoded_by_itself(make) -> None:
    several = make()
    text = several.encode([LONG], chunks=2).get("text")
    assert text.shape == (1, 2 * 16, several.widths["text"])
    parts = [tokenizer([LONG], 2).chunk(2, dim=1) for tokenizer in several.tokenizers]  # by tower, then by chunk
    alone = [several.encode(torch.cat([tower[k] for tower in parts], dim=1)).get("text") for k in range(2)]
    torch.testing.assert_close(text, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


def test_skip_leaves_out_the_last_layers_of_every_tower() -> None:
    tower, tokenizer = wider_tower(), Tokenizer(context=16)
    text = TextEncoder([tower], [tokenizer]).encode(CAPTIONS, skip=1).get("text")
    assert torch.equal(text, tower(tokenizer(CAPTIONS), 1))
    assert not torch.allclose(text, tower(tokenizer(CAPTIONS)))


def test_skipping_more_layers_than_one_of_the_towers_has_is_refused() -> None:
    TextEncoder([wider_tower()], [Tokenizer(context=16)]).check_skip(1)
    with pytest.raises(ValueError, match="of 1 layers cannot leave out 1 of them"):
        two_towers().check_skip(1)


def test_what_is_cut_off_is_what_no_chunk_has_room_for() -> None:
    words = LONG.split()
    assert encoder().cut(LONG).split() == words[14:]
    assert encoder().cut(LONG, chunks=2) == ""
    assert two_towers().cut(LONG) == encoder().cut(LONG)


def test_unknown_tokens_are_those_that_the_tower_does_not_embed() -> None:
    assert encoder().unknown_tokens("a red circle") == []
    tokens = Tokenizer(context=16)(["zebra"])[0].tolist()
    assert encoder().unknown_tokens("a red zebra") == [tokens[1]]


def test_a_token_that_one_of_two_towers_embeds_is_known() -> None:
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
    ids=["no tower", "no tokenizer", "contexts of two lengths"],
)
def test_towers_that_do_not_go_together_are_refused(towers: list[TextTower], tokenizers: list[Tokenizer]) -> None:
    with pytest.raises(ValueError, match="one or more towers of the same context, each with a tokenizer"):
        TextEncoder(towers, tokenizers)
