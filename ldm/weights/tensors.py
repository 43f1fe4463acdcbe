"""Named tensors on disk, whatever file holds them: known at once by shape, mapped into memory when asked for."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.files import atomic_write
from ldm.weights.pickled import read_pickled

PICKLED = (".ckpt", ".bin", ".pt", ".pth")
CHUNK = 2**26  # bytes that are read, cast or written at once
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Tensors(Mapping[str, Tensor]):
    """Name → a tensor on the meta device; `read` gives the values, as views of the mapped file."""

    source: Path
    meta: dict[str, Tensor]
    read: Callable[[Iterable[str]], dict[str, Tensor]]
    metadata: dict[str, Any] = field(default_factory=dict)  # plain data that the file holds besides

    def __getitem__(self, name: str) -> Tensor:
        return self.meta[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.meta.values())

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """The tensors `names.values()` under the names `names.keys()`."""

        def read(wanted: Iterable[str]) -> dict[str, Tensor]:
            wanted = list(wanted)
            values = self.read([names[name] for name in wanted])
            return {name: values[names[name]] for name in wanted}

        return replace(self, meta={new: self.meta[old] for new, old in names.items()}, read=read)

    def under(self, prefix: str) -> "Tensors":
        """Those whose names begin with `prefix`, without it."""
        return self.renamed({name[len(prefix) :]: name for name in self if name.startswith(prefix)})

    def verified(self, dtype: torch.dtype | None = None, on_read: Callable[[int], None] = lambda _: None) -> "Tensors":
        """The same, floats cast to `dtype` if given, and refused where they are not finite when they are read.

        `on_read` is told how many tensors were.
        """

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

        def read(names: Iterable[str]) -> dict[str, Tensor]:
            values = {name: cast(tensor) for name, tensor in self.read(names).items()}
            for name, tensor in values.items():
                check_finite(name, tensor, self.source)
            on_read(len(values))
            return values

        return replace(self, meta={name: cast(tensor) for name, tensor in self.meta.items()}, read=read)


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
        return _pickled(path)
    raise ValueError(f"{path} is no weights file that ldm reads; give a .safetensors, .ckpt or .bin")


def _safetensors(path: Path) -> Tensors:
    def read(names: Iterable[str]) -> dict[str, Tensor]:
        with safe_open(path, framework="pt") as file:  # opened each time: what nobody holds is unmapped
            return {name: file.get_tensor(name) for name in names}

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            meta = {name: _meta(DTYPES[one.get_dtype()], one.get_shape()) for name, one in slices.items()}
            return Tensors(path, meta, read, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}); fetch or export it again") from error
    except KeyError as error:
        raise ValueError(f"{path} holds numbers of type {error}, which ldm cannot read; convert it first") from error


def _pickled(path: Path) -> Tensors:
    saved = read_pickled(path)
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no named tensors; give a file of a model's weights")
    rest = {key: value for key, value in saved.items() if isinstance(value, str | int | dict) and value is not state}
    return held(path, {str(name): value for name, value in state.items() if isinstance(value, Tensor)}, rest)


def held(source: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any] = MappingProxyType({})) -> Tensors:
    """Tensors that are in memory, or mapped, already."""
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    return Tensors(source, meta, lambda names: {name: tensors[name] for name in names}, dict(metadata))


def _sharded(index: Path) -> Tensors:
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of sharded weights; fetch it again") from error
    shards = {name: open_tensors(index.parent / Path(name).name) for name in sorted(set(places.values()))}
    for name, shard in places.items():
        if name not in shards[shard]:
            raise ValueError(f"{index} says that {shard} holds {name}, but it does not; fetch both again")

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        wanted = list(names)
        for shard in dict.fromkeys(places[name] for name in wanted):
            found |= shards[shard].read([name for name in wanted if places[name] == shard])
        return found

    metadata: dict[str, Any] = {}
    for shard in shards.values():
        metadata |= shard.metadata
    return Tensors(index, {name: shards[shard][name] for name, shard in places.items()}, read, metadata)


def _meta(dtype: torch.dtype, shape: list[int]) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def chunks(meta: Mapping[str, Tensor], most: int = CHUNK) -> Iterator[list[str]]:
    """The names in groups of about `most` bytes."""
    group: list[str] = []
    size = 0
    for name, tensor in meta.items():
        group.append(name)
        size += tensor.nbytes
        if size >= most:
            yield group
            group, size = [], 0
    if group:
        yield group


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write `tensors` atomically, a chunk of them in memory at a time."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # which keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": CODES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for group in chunks({name: tensors[name] for name in order}):
            values = tensors.read(group)
            for name in group:
                file.write(raw(values[name]))

    atomic_write(path, write)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def check_finite(name: str, tensor: Tensor, source: object) -> None:
    """Raises ValueError for NaN or infinity; costs one pass over the memory."""
    if not tensor.is_floating_point() or math.isfinite(tensor.sum(dtype=torch.float32)):
        return
    if bad := int((~tensor.float().isfinite()).sum()):
        raise ValueError(
            f"{source}: {bad} of the {tensor.numel()} numbers of {name} are NaN or infinite; "
            "the file is damaged, fetch or export it again"
        )
