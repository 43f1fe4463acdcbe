"""Opens a weights file of any format: reads the headers of its tensors at once, and their values on demand.

Headers of safetensors are read without importing torch, so that `ldm info` answers at once.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ldm.weights.storage.tensors import ITEMSIZE, PICKLED, Header, Tensors

if TYPE_CHECKING:
    from torch import Tensor


def open_tensors(path: Path) -> Tensors:
    """Opens a .safetensors, its .index.json, or a .ckpt, .bin, .pt or .pth, of which a "state_dict" is taken.

    Raises FileNotFoundError, or ValueError for a file that is corrupt, of another format, or contains code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}; give a .safetensors, .ckpt or .bin")
    _refuse_placeholder(path)
    if re.search(r"\.index(\.\w+)?\.json$", path.name):
        return _sharded(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in PICKLED:
        from ldm.weights.storage.pickled import open_pickled  # here, because it imports torch

        return open_pickled(path)
    raise ValueError(f"{path} is not a weights file that ldm reads; give a .safetensors, .ckpt or .bin")


def _refuse_placeholder(path: Path) -> None:
    """Raises ValueError if the file is something else that is often found in place of weights."""
    with path.open("rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` in its repository, or download the "
            "file itself"
        )
    if start.startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{path} is a web page, not the weights: download the file itself")


def _safetensors(path: Path) -> Tensors:
    def read(names: Iterable[str]) -> "dict[str, Tensor]":
        with safe_open(path, framework="pt") as file:  # opened per read, so that unused tensors are unmapped
            return {name: file.get_tensor(name) for name in names}

    try:
        with safe_open(path, framework="np") as file:  # reads only the header
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = {name: Header(tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); download or export it again") from error
    if unknown := {header.dtype for header in headers.values()} - ITEMSIZE.keys():
        raise ValueError(f"{path} has tensors of type {min(unknown)}, which ldm cannot read; convert it first")
    return Tensors(path, headers, read, metadata)


def _sharded(index: Path) -> Tensors:
    try:
        places = {name: Path(file).name for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of sharded weights; download it again") from error
    shards = {name: open_tensors(index.parent / name) for name in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in shards[file]:
            raise ValueError(f"{index} says that {file} contains {name}, but it does not; download both again")

    def read(names: Iterable[str]) -> "dict[str, Tensor]":
        values: dict[str, Tensor] = {}
        wanted = list(names)
        for file in dict.fromkeys(places[name] for name in wanted):
            values |= shards[file].read([name for name in wanted if places[name] == file])
        return values

    metadata: dict[str, Any] = {}
    for shard in shards.values():
        metadata |= shard.metadata
    return Tensors(index, {name: shards[file][name] for name, file in places.items()}, read, metadata)
