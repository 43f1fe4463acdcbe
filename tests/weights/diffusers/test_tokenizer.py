import json
from pathlib import Path
from typing import Any

import pytest

from ldm.weights.contents import open_contents
from ldm.weights.diffusers.reader import read_folder
from ldm.weights.diffusers.tokenizer import tokenizer_pad


@pytest.mark.parametrize(
    "special, config, pad",
    [
        ({"pad_token": "!"}, {"pad_token": "<|endoftext|>"}, 0),  # as in stabilityai/stable-diffusion-2
        ({"pad_token": {"content": "!"}}, {}, 0),
        ({}, {"pad_token": "<|endoftext|>"}, 49407),
        ({}, {}, 49407),
    ],
)
def test_the_padding_token_is_that_of_the_tokenizer(
    folder: Path, special: dict[str, Any], config: dict[str, Any], pad: int
) -> None:
    (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_folder(folder).pad == pad
    assert open_contents(folder / "text_encoder").pad == pad  # also if only the text encoder is given


def test_a_vocabulary_other_than_that_of_clip_is_refused(folder: Path) -> None:
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(ValueError, match="another vocabulary than CLIP's"):
        tokenizer_pad(folder / "tokenizer")


def test_a_vocabulary_in_a_tokenizer_json_is_read(folder: Path) -> None:
    vocab = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    assert tokenizer_pad(folder / "tokenizer") == 49407
