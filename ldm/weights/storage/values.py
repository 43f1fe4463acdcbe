"""The values of named tensors: cast, checked and written, a chunk of them in memory at a time."""

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


def header(tensor: Tensor) -> Header:
    return Header(CODES[tensor.dtype], tuple(tensor.shape))


def on_meta(header: Header) -> Tensor:
    return torch.empty(header.shape, dtype=DTYPES[header.dtype], device="meta")


def in_memory(source: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any] = MappingProxyType({})) -> Tensors:
    """Tensors that are in memory, or mapped, already. Raises ValueError for a type that no file of weights has."""
    if unknown := {tensor.dtype for tensor in tensors.values()} - CODES.keys():
        raise ValueError(f"{source} holds numbers of type {unknown.pop()}, which ldm cannot read; convert it first")
    headers = {name: header(tensor) for name, tensor in tensors.items()}
    return Tensors(source, headers, lambda names: {name: tensors[name] for name in names}, dict(metadata))


def verified(
    tensors: Tensors, dtype: torch.dtype | None = None, on_read: Callable[[int], None] = lambda _: None
) -> Tensors:
    """The same, floats cast to `dtype` if given, and refused where they are not finite when they are read.

    `on_read` is told how many tensors were.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        values = {name: cast(tensor) for name, tensor in tensors.read(names).items()}
        for name, tensor in values.items():
            check_finite(name, tensor, tensors.source)
        on_read(len(values))
        return values

    headers = {name: header(cast(on_meta(one))) for name, one in tensors.items()}
    return replace(tensors, headers=headers, read=read)


def chunks(headers: Mapping[str, Header], most: int = CHUNK) -> Iterator[list[str]]:
    """The names in groups of about `most` bytes."""
    group: list[str] = []
    size = 0
    for name, one in headers.items():
        group.append(name)
        size += one.nbytes
        if size >= most:
            yield group
            group, size = [], 0
    if group:
        yield group


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write `tensors` atomically, a chunk of them in memory at a time."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # which keeps every tensor aligned
    told: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        told[name] = {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
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
