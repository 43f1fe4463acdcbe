"""Reads and writes transformers tokenizer folders with CLIP's vocabulary."""

import filecmp
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.files import write_json
from ldm.weights.storage.tensors import ASSETS

CLIP_BPE = ASSETS / "clip_bpe"
MAX_JSON = 2**26  # bytes
BEGIN, END = "<|startoftext|>", "<|endoftext|>"

Config = dict[str, Any]


def tokenizer_pad(folder: Path) -> int:
    """Returns the padding token of the tokenizer in a folder.

    Raises ValueError unless the vocabulary, the merges and the two special tokens are CLIP's. If the padding token is
    "!", transformers also reads every "!" in a caption as padding; ldm reads it as a word, as OpenCLIP did in training.
    """
    vocabulary = _vocabulary(folder)
    if vocabulary != json.loads((CLIP_BPE / "vocab.json").read_text()):
        raise ValueError(
            f"the tokenizer in {folder} has another vocabulary than CLIP's, which is the only one that ldm "
            "reads; give a model of Stable Diffusion 1.x or 2.x"
        )
    if _merges(folder) not in (None, _merges_in(CLIP_BPE / "merges.txt")):
        raise ValueError(
            f"the tokenizer in {folder} has other merges than CLIP's, so that it splits words differently; give a "
            "model of Stable Diffusion 1.x or 2.x"
        )
    special = _special(folder)
    token = special.get("pad_token") or END
    if token not in vocabulary:
        raise ValueError(
            f"the tokenizer in {folder} pads with {token!r}, which is not in its vocabulary; download it again"
        )
    expected = {"bos_token": BEGIN, "eos_token": END, "unk_token": END}
    other = [f"{name}={special[name]!r}" for name, value in expected.items() if special.get(name) not in (None, value)]
    other += [
        f"the added token {name!r} ({number})" for name, number in _added(folder) if vocabulary.get(name) != number
    ]
    if other:
        raise ValueError(
            f"the tokenizer in {folder} has {', '.join(other[:4])}, which ldm would read as other tokens; "
            "give the model without it"
        )
    return int(vocabulary[token])


def _special(folder: Path) -> dict[str, str]:
    """Returns the special tokens by name; special_tokens_map.json has precedence, as in transformers."""
    special: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = read_config(folder / name) if (folder / name).is_file() else {}
        for kind in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = config.get(kind)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and not isinstance(token, str):
                raise ValueError(f"{folder / name} has {kind}={token!r}, which is not text; download it again")
            special |= {kind: token} if token else {}
    return special


def _added(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yields the tokens added to the vocabulary and their ids, from every file that may list them."""
    files = "added_tokens.json", "tokenizer_config.json", "tokenizer.json"
    plain, config, fast = (read_config(folder / name) if (folder / name).is_file() else {} for name in files)
    try:
        yield from plain.items()
        for number, token in (config.get("added_tokens_decoder") or {}).items():
            yield token["content"], int(number)
        for token in fast.get("added_tokens") or []:
            yield token["content"], token["id"]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} does not list its added tokens as a tokenizer does; download it again") from error


def write_tokenizer(folder: Path, context: int, pad: int) -> None:
    """Writes CLIP's tokenizer with this context length and this padding token."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(CLIP_BPE / name, folder / name)
    token = next(token for token, number in read_config(folder / "vocab.json").items() if number == pad)
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": token}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": context, **special}
    )


def read_config(file: Path) -> Config:
    """Returns the object in a JSON file. Raises FileNotFoundError, or ValueError with the file's name."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; download the folder again")
    if file.stat().st_size > MAX_JSON:
        raise ValueError(
            f"{file} has more than {MAX_JSON >> 20} MiB, too many for a file of settings; download it again"
        )
    if file.read_bytes()[:23] == b"version https://git-lfs":
        raise ValueError(
            f"{file} is a pointer of Git LFS, not the file: run `git lfs pull` in its repository, or download the file"
        )
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not a JSON file of settings ({error}); download it again") from error


def _vocabulary(folder: Path) -> dict[str, int]:
    shipped = CLIP_BPE / "vocab.json"
    if (folder / "vocab.json").is_file():
        same = filecmp.cmp(folder / "vocab.json", shipped, shallow=False)
        return read_config(shipped if same else folder / "vocab.json")
    if (folder / "tokenizer.json").is_file():
        return dict(_model(folder).get("vocab") or {})
    raise FileNotFoundError(f"{folder} contains neither vocab.json nor tokenizer.json; download the tokenizer again")


def _merges(folder: Path) -> list[str] | None:
    """Returns the merges, most frequent first, or None if the folder lists none."""
    if (folder / "merges.txt").is_file():
        return _merges_in(folder / "merges.txt")
    if not (folder / "tokenizer.json").is_file():
        return None
    merges = _model(folder).get("merges") or None
    return merges and [merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in merges]


def _merges_in(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text; download it again") from error
    return [line for line in lines if line and not line.startswith("#version")]


def _model(folder: Path) -> Config:
    model = read_config(folder / "tokenizer.json").get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{folder / 'tokenizer.json'} has no vocabulary; download the tokenizer again")
    return model
