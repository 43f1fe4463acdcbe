from typing import Any

import pytest
import torch

from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.pipeline.emphasis import chunk_count, encode_emphasis
from ldm.pipeline.pipeline import Pipeline
from tests.tiny import tiny_text_encoder, tiny_text_tower

LONG = "red blue white square circle on background a " * 3  # 24 tokens; a chunk has room for 14
SYNTAX: dict[str, Any] = {"prompt_syntax": "a1111"}


def test_a_prompt_without_brackets_is_encoded_bit_for_bit_like_a_plain_one() -> None:
    encoder, prompts = tiny_text_encoder(), ["a red circle", "blue square"]
    assert torch.equal(encode_emphasis(encoder, prompts, 1).get("text"), encoder.encode(prompts).get("text"))
    assert torch.equal(encode_emphasis(encoder, [LONG], 2).get("text"), encoder.encode([LONG], 2).get("text"))


def test_states_are_multiplied_by_their_weights_and_the_mean_restored() -> None:
    encoder = tiny_text_encoder()
    plain = encoder.encode(["a red blue circle"]).get("text")[0]
    weights = torch.ones(16, 1)
    weights[2] = 1.5  # begin, a, red, …
    weights[3] = 1 / 1.1
    scaled = plain * weights
    expected = scaled * (plain.mean() / scaled.mean())
    text = encode_emphasis(encoder, ["a (red:1.5) [blue] circle"], 1).get("text")[0]
    torch.testing.assert_close(text, expected, rtol=1e-5, atol=1e-6)


def test_each_tower_of_a_text_encoder_keeps_its_own_mean() -> None:
    towers = [tiny_text_tower(2), tiny_text_tower(7)]
    tokenizers = [Tokenizer(context=16), Tokenizer(context=16, pad=0)]
    both = encode_emphasis(TextEncoder(towers, tokenizers), ["a (red:1.5) circle"], 1).get("text")
    alone = [
        encode_emphasis(TextEncoder([tower], [tokenizer]), ["a (red:1.5) circle"], 1).get("text")
        for tower, tokenizer in zip(towers, tokenizers, strict=True)
    ]
    torch.testing.assert_close(both, torch.cat(alone, dim=-1), rtol=1e-6, atol=1e-7)


def test_shorter_prompts_are_padded_with_empty_chunks() -> None:
    encoder, prompts = tiny_text_encoder(), ["a red circle", "red BREAK blue BREAK white"]
    assert chunk_count(encoder, prompts) == 3
    text = encode_emphasis(encoder, prompts, 3).get("text")
    parts = [["a red circle", "red"], ["", "blue"], ["", "white"]]
    expected = torch.cat([encoder.encode(captions).get("text") for captions in parts], dim=1)
    torch.testing.assert_close(text, expected, rtol=1e-5, atol=1e-6)


def test_a_call_uses_and_records_the_chunks_of_its_longest_prompt(pipeline: Pipeline) -> None:
    result = pipeline([LONG, "red"], **SYNTAX)
    assert [(one["chunks"], one["prompt_syntax"]) for one in result.settings] == [(2, "a1111")] * 2
    again = pipeline("red", seeds=1, **SYNTAX | {"chunks": result.settings[1]["chunks"]})
    assert (again.images[0].int() - result.images[1].int()).abs().max() <= 1


def test_emphasis_changes_an_image_and_plain_prompts_do_not(pipeline: Pipeline) -> None:
    plain = pipeline("a red circle").images
    assert torch.equal(pipeline("a red circle", **SYNTAX).images, plain)
    assert not torch.equal(pipeline("a (red:1.6) circle", **SYNTAX).images, plain)


@pytest.mark.parametrize("prompt", ["a (red:1.2) circle", "a red <lora:ink:0.8> circle", "red BREAK blue", "((red))"])
def test_the_syntax_in_a_plain_prompt_is_warned_about(pipeline: Pipeline, prompt: str) -> None:
    warnings: list[str] = []
    pipeline(prompt, on_warning=warnings.append)
    assert any("prompt_syntax=a1111" in text for text in warnings)


def test_a_plain_prompt_with_parentheses_is_not_warned_about(pipeline: Pipeline) -> None:
    warnings: list[str] = []
    pipeline("a red (blue) circle, at 3:15", on_warning=warnings.append)
    assert not any("prompt_syntax" in text for text in warnings)


def test_an_unknown_syntax_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="prompt_syntax is 'comfy', but must be one of plain, a1111"):
        pipeline("red", prompt_syntax="comfy")
