"""Tests that CLIP's tokenizer is that of transformers."""

import json

from tokenizers import Tokenizer as Bpe
from transformers import CLIPTokenizer

from ldm.nn.tokenizer import CLIP_BPE, Tokenizer


def steps(bpe: Bpe) -> dict[str, object]:
    """Returns all steps from text to tokens and back; ldm itself adds begin and end."""
    described: dict[str, object] = json.loads(bpe.to_str())
    del described["post_processor"]
    return described


def test_every_step_of_the_tokenizer_equals_that_of_transformers() -> None:
    files = {"vocab": str(CLIP_BPE / "vocab.json"), "merges": str(CLIP_BPE / "merges.txt")}
    reference, tokenizer = CLIPTokenizer(**files), Tokenizer()
    assert steps(tokenizer._bpe) == steps(reference.backend_tokenizer)
    assert (tokenizer.begin, tokenizer.end) == (reference.bos_token_id, reference.eos_token_id)
