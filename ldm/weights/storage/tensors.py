"""Named tensors on disk, whatever file holds them: their headers at once, their values when asked for.

Reading headers needs no torch, so that `ldm info` answers at once.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

ASSETS = Path(__file__).parents[2] / "assets"
PICKLED = (".ckpt", ".bin", ".pt", ".pth")
ITEMSIZE = {  # bytes of one number
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


class Header(NamedTuple):
    """Type, as safetensors spells it, and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return "F" in self.dtype

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize


@dataclass(frozen=True, eq=False)
class Tensors(Mapping[str, Header]):
    """Name → header; `read` gives the values, as views of the mapped file."""

    source: Path
    headers: dict[str, Header]
    read: "Callable[[Iterable[str]], dict[str, Tensor]]"
    metadata: dict[str, Any] = field(default_factory=dict)  # plain data that the file holds besides

    def __getitem__(self, name: str) -> Header:
        return self.headers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for header in self.headers.values())

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """The tensors `names.values()` under the names `names.keys()`."""

        def read(wanted: Iterable[str]) -> "dict[str, Tensor]":
            wanted = list(wanted)
            values = self.read([names[name] for name in wanted])
            return {name: values[names[name]] for name in wanted}

        return replace(self, headers={new: self.headers[old] for new, old in names.items()}, read=read)

    def under(self, prefix: str) -> "Tensors":
        """Those whose names begin with `prefix`, without it."""
        return self.renamed({name[len(prefix) :]: name for name in self if name.startswith(prefix)})


def locate(path: str | Path) -> Path:
    """The file that `path` names; "assets:NAME" is one that ships with ldm. Raises FileNotFoundError."""
    text = str(path)
    found = ASSETS / text.removeprefix("assets:") if text.startswith("assets:") else Path(text).expanduser()
    if not found.is_file():
        raise FileNotFoundError(f"there is no weights file {found}; give the path of a .safetensors file")
    return found


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
        from ldm.weights.storage.pickled import open_pickled  # here: it needs torch

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


def refuse_misfits(
    source: object, network: str, missing: Iterable[str], unexpected: Iterable[str], misshapen: Sequence[str]
) -> None:
    """Raises one ValueError for all tensors that keep the weights in `source` out of a network, if there are any."""
    problems = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": misshapen}
    told = [f"{len(names)} {what}: {_shorten(names)}" for what, names in problems.items() if names]
    if told:
        raise ValueError(f"the weights in {source} are those of another {network} ({'; '.join(told)})")


def _shorten(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
