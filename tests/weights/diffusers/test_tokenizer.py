import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

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


def test_a_tokenizer_that_transformers_saved_is_read(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "saved")
    assert tokenizer_pad(folder / "saved") == 49407


@pytest.mark.parametrize("file", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
def test_a_tokenizer_with_an_added_token_is_refused_by_its_name(folder: Path, file: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<sks>"])
    assert tokenizer("<sks>").input_ids == [49406, 49408, 49407]
    tokenizer.save_pretrained(folder / "saved")
    listed: dict[str, Any] = {
        "added_tokens.json": {"<sks>": 49408},
        "tokenizer_config.json": {"added_tokens_decoder": {"49408": {"content": "<sks>"}}},
    }
    if file == "tokenizer.json":
        shutil.copyfile(folder / "saved" / file, folder / "tokenizer" / file)
    else:
        (folder / "tokenizer" / file).write_text(json.dumps(listed[file]))
    with pytest.raises(ValueError, match=r"the added token '<sks>' \(49408\)"):
        tokenizer_pad(folder / "tokenizer")


def test_a_tokenizer_with_other_special_tokens_or_merges_is_refused(folder: Path) -> None:
    file, merges = folder / "tokenizer" / "special_tokens_map.json", folder / "tokenizer" / "merges.txt"
    file.write_text(json.dumps({"bos_token": "a"}))
    with pytest.raises(ValueError, match="bos_token='a'"):
        tokenizer_pad(folder / "tokenizer")
    file.write_text(json.dumps({"bos_token": ["a"]}))
    with pytest.raises(ValueError, match="not text"):
        tokenizer_pad(folder / "tokenizer")
    file.unlink()
    first, second, *rest = merges.read_text().splitlines()[1:]
    merges.write_text("\n".join([second, first, *rest]))
    with pytest.raises(ValueError, match="other merges than CLIP's"):
        tokenizer_pad(folder / "tokenizer")
