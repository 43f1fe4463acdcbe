"""Opening a file of weights of any kind: its tensors' headers at once, their values when they are asked for.

Headers are read without torch, so that `ldm info` answers at once.
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
    """What a .safetensors, its .index.json, or a .ckpt, .bin, .pt or .pth holds; of checkpoints the "state_dict".

    Raises FileNotFoundError, or ValueError for a file that is damaged, of another kind, or holds code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}; give a .safetensors, .ckpt or .bin")
    if re.search(r"\.index(\.\w+)?\.json$", path.name):
        return _sharded(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in PICKLED:
        from ldm.weights.storage.pickled import open_pickled  # here, because it imports torch

        return open_pickled(path)
    raise ValueError(f"{path} is no weights file that ldm reads; give a .safetensors, .ckpt or .bin")


def _safetensors(path: Path) -> Tensors:
    def read(names: Iterable[str]) -> "dict[str, Tensor]":
        with safe_open(path, framework="pt") as file:  # opened each time: what nobody holds is unmapped
            return {name: file.get_tensor(name) for name in names}

    try:
        with safe_open(path, framework="np") as file:  # of which only the header is read
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = {name: Header(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}); fetch or export it again") from error
    if unknown := {header.dtype for header in headers.values()} - ITEMSIZE.keys():
        raise ValueError(f"{path} holds numbers of type {min(unknown)}, which ldm cannot read; convert it first")
    return Tensors(path, headers, read, metadata)


def _sharded(index: Path) -> Tensors:
    try:
        places = {name: Path(file).name for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of sharded weights; fetch it again") from error
    shards = {name: open_tensors(index.parent / name) for name in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in shards[file]:
            raise ValueError(f"{index} says that {file} holds {name}, but it does not; fetch both again")

    def read(names: Iterable[str]) -> "dict[str, Tensor]":
        found: dict[str, Tensor] = {}
        wanted = list(names)
        for file in dict.fromkeys(places[name] for name in wanted):
            found |= shards[file].read([name for name in wanted if places[name] == file])
        return found

    metadata: dict[str, Any] = {}
    for shard in shards.values():
        metadata |= shard.metadata
    return Tensors(index, {name: shards[file][name] for name, file in places.items()}, read, metadata)
