"""Reads and writes a shard of latents: one file for the images of a tar, or for those of one size.

For the n readable samples of the tar, in order, it stores
- `moments` (n, 2z, h, w) float16;
- `keys` and `captions` as concatenated UTF-8, with the end of each in `key_ends` (n,) and `caption_ends`, int64;
- `caption_groups` (n,), the number of captions up to and including each sample;
- optionally `states` (captions, tokens, d) float16 or float32, the text encoder's states of every caption.

The record is in the file's metadata. It is a single file so that one rename publishes it.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.mapped import map_arrays, write_arrays

ARRAYS = ("moments", "keys", "key_ends", "captions", "caption_ends", "caption_groups")
AGAIN = "run the same ldm encode again, which encodes only the damaged and missing shards"


@dataclass(frozen=True)
class Shard:
    """A memory-mapped shard of a cache; `record` is {"settings", "source", "samples", "quarantined", "sha256"}."""

    moments: np.ndarray
    keys: np.ndarray
    key_ends: np.ndarray
    captions: np.ndarray
    caption_ends: np.ndarray
    caption_groups: np.ndarray
    record: dict[str, Any]
    states: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in vars(self).items() if isinstance(array, np.ndarray)}

    def key(self, row: int) -> str:
        return _text(self.keys, self.key_ends, row)

    def caption_numbers(self, row: int) -> range:
        """Returns the indices of a sample's captions among all captions of the shard."""
        return range(self.caption_groups[row - 1] if row else 0, self.caption_groups[row])

    def caption(self, number: int) -> str:
        return _text(self.captions, self.caption_ends, number)

    def captions_of(self, row: int) -> list[str]:
        return [self.caption(number) for number in self.caption_numbers(row)]


def _text(column: np.ndarray, ends: np.ndarray, row: int) -> str:
    return column[ends[row - 1] if row else 0 : ends[row]].tobytes().decode()


def _column(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    data = [text.encode("utf-8", "replace") for text in texts]  # JSON strings may contain lone surrogates
    return np.frombuffer(b"".join(data), np.uint8), np.cumsum([len(text) for text in data], dtype=np.int64)


def write_shard(
    path: Path,
    moments: np.ndarray,
    keys: Sequence[str],
    captions: Sequence[list[str]],
    record: dict[str, Any],
    states: np.ndarray | None = None,
) -> None:
    """Writes a shard atomically. The same samples and record give the same bytes.

    `captions` lists the captions of each sample, of which there is at least one.
    """
    groups = np.cumsum([len(texts) for texts in captions], dtype=np.int64)
    columns = (moments, *_column(keys), *_column([text for texts in captions for text in texts]), groups)
    arrays = dict(zip(ARRAYS, columns, strict=True)) | ({} if states is None else {"states": states})
    write_arrays(path, arrays, {**record, "samples": len(keys), "sha256": digest(arrays)})


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of the arrays' names, types, shapes and bytes, sorted by name."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype.str} {list(array.shape)}".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def map_shard(path: Path) -> Shard:
    """Maps a shard into memory; its pages are read on access. Raises ValueError if the file is truncated."""
    arrays, record = map_arrays(path, ARRAYS, optional=["states"], remedy=AGAIN)
    return Shard(**arrays, record=record)


def is_intact(path: Path) -> bool:
    """Returns whether the arrays of a shard match the checksum in its header. Reads the complete file."""
    try:
        shard = map_shard(path)
        return len(shard.moments) == shard.record["samples"] and digest(shard.arrays) == shard.record["sha256"]
    except (ValueError, KeyError, TypeError):
        return False


def key_hashes(cache: Path, names: Sequence[str]) -> np.ndarray:
    """Returns the CRC-32 of every key in the shards `names`, (n,) uint32."""
    shards = (map_shard(cache / f"{name}.safetensors") for name in names)
    return np.array([zlib.crc32(s.key(row).encode()) for s in shards for row in range(len(s.key_ends))], np.uint32)
