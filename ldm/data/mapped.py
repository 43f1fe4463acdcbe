"""Writes named arrays and a JSON record to one file, and memory-maps them from it.

The format is safetensors, with the record in its metadata. The layout is fixed, so a row is a slice of the mapped file,
which all processes share through the page cache. Only a header is parsed, and nothing is unpickled.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save

from ldm.files import atomic_write

TYPES = {
    name: np.dtype(kind) for name, kind in {"F16": "<f2", "F32": "<f4", "I64": "<i8", "U32": "<u4", "U8": "u1"}.items()
}
HEADER = b'{"__metadata__":{"ldm":'  # the start of every header, after its length in 8 bytes
_MAX_HEADER = 1 << 20


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Writes the file atomically. The same arrays and record give the same bytes."""
    ordered = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # safetensors stores bytes as is
    data = save(ordered, {"ldm": json.dumps(record, sort_keys=True)})
    atomic_write(path, lambda file: file.write(data))


def read_record(path: Path) -> dict[str, Any]:
    """Returns the record from the header. Raises ValueError if `write_arrays` did not write the file."""
    with open(path, "rb") as file:
        return _read_header(file)[0]


def is_array_file(path: Path) -> bool:
    """Returns whether the header at `path` is one that `write_arrays` writes."""
    try:
        read_record(path)
    except (OSError, ValueError):
        return False
    return True


def map_arrays(
    path: Path, names: Sequence[str], optional: Sequence[str] = (), remedy: str = "create it again"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Maps the arrays, whose pages are read on access, and reads the record.

    Raises ValueError for a truncated file, with the `remedy`.
    """
    with open(path, "rb") as file:  # opened only once, because another process may replace the file
        record, header, start = _read_header(file, remedy)
        # Copy-on-write, because torch warns about read-only arrays.
        data = np.memmap(file, np.uint8, "c").view(np.ndarray)[start:]
    try:
        present = [*names, *(name for name in optional if name in header)]
        return {name: _view(data, header[name]) for name in present}, record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is truncated or corrupt; {remedy}") from error


def _read_header(file: BinaryIO, remedy: str = "create it again") -> tuple[dict[str, Any], dict[str, Any], int]:
    """Returns the record, the header's entries and the offset of the data in bytes."""
    try:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise ValueError(f"the header has {length} bytes, more than {_MAX_HEADER}")
        header = json.loads(file.read(length))
        return json.loads(header.pop("__metadata__")["ldm"]), header, 8 + length
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} is not an array file written by ldm, or is corrupt; {remedy}") from error


def _view(data: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    kind, (begin, end) = TYPES[entry["dtype"]], entry["data_offsets"]
    if end - begin != kind.itemsize * math.prod(entry["shape"]):
        raise ValueError("the offsets do not match the shape")
    return data[begin:end].view(kind).reshape(entry["shape"])
