"""Casts, checks and writes the values of named tensors, with one chunk of them in memory at a time."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.files import atomic_write
from ldm.weights.storage.tensors import Header, Tensors

CHUNK = 2**26  # bytes read, cast or written at a time
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


def header(tensor: Tensor) -> Header:
    return Header(CODES[tensor.dtype], tuple(tensor.shape))


def on_meta(header: Header) -> Tensor:
    return torch.empty(header.shape, dtype=DTYPES[header.dtype], device="meta")


def in_memory(source: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any] = MappingProxyType({})) -> Tensors:
    """Wraps tensors that are in memory, or mapped. Raises ValueError for an unsupported dtype."""
    if unknown := {tensor.dtype for tensor in tensors.values()} - CODES.keys():
        raise ValueError(f"{source} has tensors of type {unknown.pop()}, which ldm cannot read; convert it first")
    headers = {name: header(tensor) for name, tensor in tensors.items()}
    return Tensors(source, headers, lambda names: {name: tensors[name] for name in names}, dict(metadata))


def verified(
    tensors: Tensors, dtype: torch.dtype | None = None, on_read: Callable[[int], None] = lambda _: None
) -> Tensors:
    """Returns the same tensors, whose floats are cast to `dtype` (if given) and checked when they are read.

    Reading raises ValueError for NaN and infinity, and calls `on_read` with the number of tensors read.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        stored = tensors.read(names)
        values = {name: cast(tensor) for name, tensor in stored.items()}
        for name, tensor in values.items():
            if not _is_finite(tensor):
                check_finite(name, stored[name], tensors.source)
                raise ValueError(_overflow(name, stored[name], tensor.dtype, tensors.source))
        on_read(len(values))
        return values

    headers = {name: header(cast(on_meta(stored))) for name, stored in tensors.items()}
    return replace(tensors, headers=headers, read=read)


def chunks(headers: Mapping[str, Header], most: int = CHUNK) -> Iterator[list[str]]:
    """Yields the names in groups of about `most` bytes."""
    group: list[str] = []
    size = 0
    for name, stored in headers.items():
        group.append(name)
        size += stored.nbytes
        if size >= most:
            yield group
            group, size = [], 0
    if group:
        yield group


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Writes `tensors` atomically, with one chunk of them in memory at a time."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # keeps every tensor aligned
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        dtype, shape = tensors[name]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for group in chunks({name: tensors[name] for name in order}):
            values = tensors.read(group)
            for name in group:
                file.write(raw_bytes(values[name]))

    atomic_write(path, write)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor in memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _overflow(name: str, stored: Tensor, dtype: torch.dtype, source: object) -> str:
    largest, limit = float(stored.abs().max()), torch.finfo(dtype).max
    return (
        f"{source}: {name} holds {largest:.6g}, but the largest number of {str(dtype).removeprefix('torch.')} is "
        f"{limit:.6g}; convert to bfloat16 or float32"
    )


def check_finite(name: str, tensor: Tensor, source: object) -> None:
    """Raises ValueError if `tensor` contains NaN or infinity."""
    if not _is_finite(tensor):
        bad = int((~tensor.float().isfinite()).sum())
        raise ValueError(
            f"{source}: {bad} of the {tensor.numel()} values of {name} are NaN or infinite; "
            "the file is corrupt, download or export it again"
        )


def _is_finite(tensor: Tensor) -> bool:
    """Returns whether all values are finite in float32, in one pass unless the sum overflows."""
    if not tensor.is_floating_point() or math.isfinite(tensor.sum(dtype=torch.float32)):
        return True
    return bool(tensor.float().isfinite().all())
