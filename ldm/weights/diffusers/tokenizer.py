"""Reads and writes tokenizer folders of transformers, whose vocabulary must be CLIP's."""

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

from ldm.files import write_json
from ldm.weights.storage.tensors import ASSETS

CLIP_BPE = ASSETS / "clip_bpe"

Config = dict[str, Any]


def tokenizer_pad(folder: Path) -> int:
    """Returns the padding token of the tokenizer in a folder. Raises ValueError unless its vocabulary is CLIP's."""
    vocabulary = _vocabulary(folder)
    if vocabulary != json.loads((CLIP_BPE / "vocab.json").read_text()):
        raise ValueError(
            f"the tokenizer in {folder} has another vocabulary than CLIP's, which is the only one that ldm "
            "reads; give a model of Stable Diffusion 1.x or 2.x"
        )
    token: Any = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # in transformers' order of precedence
        if token is None and (folder / name).is_file():
            token = read_config(folder / name).get("pad_token")
    content = token["content"] if isinstance(token, dict) else token or "<|endoftext|>"
    if content not in vocabulary:
        raise ValueError(
            f"the tokenizer in {folder} pads with {content!r}, which is not in its vocabulary; download it again"
        )
    return int(vocabulary[content])


def write_tokenizer(folder: Path, context: int, pad: int) -> None:
    """Writes CLIP's tokenizer with this context length and this padding token."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(CLIP_BPE / name, folder / name)
    token = next(token for token, number in read_config(folder / "vocab.json").items() if number == pad)
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": token,
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": context, **special}
    )


def read_config(file: Path) -> Config:
    """Returns the object in a JSON file. Raises FileNotFoundError or ValueError with its name."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; download the folder again")
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON file of settings ({error}); download it again") from error


def _vocabulary(folder: Path) -> dict[str, int]:
    shipped = CLIP_BPE / "vocab.json"
    if (folder / "vocab.json").is_file():
        same = filecmp.cmp(folder / "vocab.json", shipped, shallow=False)
        return read_config(shipped if same else folder / "vocab.json")
    if (folder / "tokenizer.json").is_file():
        return dict(read_config(folder / "tokenizer.json")["model"]["vocab"])
    raise FileNotFoundError(f"{folder} contains neither vocab.json nor tokenizer.json; download the tokenizer again")
