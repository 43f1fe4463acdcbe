"""Named arrays with a record of what they are, in one file that is mapped rather than read.

The format is safetensors, the record JSON in its metadata: a fixed layout, so that a row is a slice of the mapped
file, shared by all processes through the page cache; nothing to parse but a header, and nothing that unpickles.
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
_MAX_HEADER = 1 << 20


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Atomically; the same arrays and record give the same bytes."""
    ordered = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # safetensors stores bytes as is
    data = save(ordered, {"ldm": json.dumps(record, sort_keys=True)})
    atomic_write(path, lambda file: file.write(data))


def read_record(path: Path) -> dict[str, Any]:
    """The record alone, from the header; ValueError for a file that `write_arrays` did not write."""
    with open(path, "rb") as file:
        return _read_header(file)[0]


def is_array_file(path: Path) -> bool:
    """Whether `write_arrays` wrote the file at `path`, as its header says."""
    try:
        read_record(path)
    except (OSError, ValueError):
        return False
    return True


def map_arrays(
    path: Path, names: Sequence[str], optional: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays, whose pages are read when they are used, and the record. Raises ValueError if the file is cut."""
    with open(path, "rb") as file:  # once: another process may put another file in its place
        record, header, start = _read_header(file)
        # Copy-on-write, because torch warns of arrays that cannot be written to.
        data = np.memmap(file, np.uint8, "c").view(np.ndarray)[start:]
    try:
        there = [*names, *(name for name in optional if name in header)]
        return {name: _view(data, header[name]) for name in there}, record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is cut short or damaged; make it anew") from error


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The record, the header's entries and where the data begins."""
    try:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
        return json.loads(header.pop("__metadata__")["ldm"]), header, 8 + length
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} holds no arrays of ldm's, or is damaged; make it anew") from error


def _view(data: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    kind, (begin, end) = TYPES[entry["dtype"]], entry["data_offsets"]
    if end - begin != kind.itemsize * math.prod(entry["shape"]):
        raise ValueError("the offsets do not fit the shape")
    return data[begin:end].view(kind).reshape(entry["shape"])
