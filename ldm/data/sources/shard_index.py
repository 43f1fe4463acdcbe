"""Indexes the samples of shards: the byte ranges of each image and its texts, scanned once and cached on disk."""

import hashlib
import os
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.data.mapped import is_array_file, map_arrays, write_arrays
from ldm.data.sources.captions import DEFAULT, Captions
from ldm.data.sources.image import EXTENSIONS
from ldm.data.sources.storage import File
from ldm.data.sources.tar import Member, members
from ldm.files import cache_home
from ldm.progress import Progress

VERSION = 4
ARRAYS = ("starts", "spans", "hashes", "keys", "key_ends")
# As in webdataset, the key is everything up to the first dot of the last path component.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


@dataclass(frozen=True)
class Index:
    """One row per sample of s shards, in the order of the shards.

    Attributes:
        starts: (s + 1,), shard k has the rows from starts[k] up to, but excluding, starts[k + 1].
        spans: (n, 1 + t, 2) int64, offset and size of the image and of the text with each of t extensions; an offset of
            -1 marks a missing member.
        hashes: (n,) uint32, the CRC-32 of the keys.
        keys: concatenated UTF-8 of the keys.
        key_ends: (n,) int64, the end of each key in `keys`.
        losses: messages about what could not be read, by the number of the shard.
    """

    starts: np.ndarray
    spans: np.ndarray
    hashes: np.ndarray
    keys: np.ndarray
    key_ends: np.ndarray
    losses: dict[int, str]

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def present(self) -> np.ndarray:
        """Returns whether any sample has an image, and a text with each extension, (1 + t,) bool."""
        return np.any(self.spans[..., 0] >= 0, axis=0)

    def texts(self, row: int, captions: Captions) -> Sequence[tuple[str, tuple[int, int]]]:
        """Returns (extension, (offset, size)) of the texts to read; the index is for the extensions of `captions`."""
        spans = zip(captions.extensions, self.spans[row, 1:].tolist(), strict=True)
        return captions.needed([(extension, (offset, size)) for extension, (offset, size) in spans if offset >= 0])

    def shard(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, "right")) - 1

    def key(self, row: int) -> str:
        return self.keys[self.key_ends[row - 1] if row else 0 : self.key_ends[row]].tobytes().decode()


def load_index(shards: Sequence[File], texts: Sequence[str] = DEFAULT) -> Index:
    """Returns the index of all shards for texts with the extensions `texts`.

    The index of several shards is mapped from one file in `cache_home`/index while none of them has changed. Otherwise
    it is joined from the index of each shard, a file beside the shard. That file is in `cache_home`/index too if the
    shard is in object storage, its folder is not writable, or another kind of file has the name.
    """
    if len(shards) == 1:
        return _shard_index(shards[0], texts)
    stamp = _digest(*texts, *(f"{shard} {shard.size} {shard.stamp}" for shard in shards))
    return _cached(_folder() / f"{len(shards)}-shards.{stamp[:32]}.safetensors", stamp, lambda: _joined(shards, texts))


def _shard_index(shard: File, texts: Sequence[str]) -> Index:
    stamp = f"{shard.size} {shard.stamp} {' '.join(texts)}"
    return _cached(_path_beside(shard), stamp, lambda: scan(shard, texts), alternative=_path_in_home(shard))


def _cached(path: Path, stamp: str, make: Callable[[], Index], alternative: Path | None = None) -> Index:
    """Returns the index at `path` if it has the stamp, else the result of `make`, which is then written to `path`.

    If `path` is another kind of file, it is left as it is and `alternative`, if given, is used instead.
    """
    full_stamp = f"{VERSION} {stamp}"
    try:
        arrays, record = map_arrays(path, ARRAYS)
        if record["stamp"] == full_stamp:
            return Index(**arrays, losses={int(shard): loss for shard, loss in record["losses"].items()})
    except (OSError, ValueError, KeyError):  # missing or corrupt, so it is created again
        if alternative and path.exists() and not is_array_file(path):
            return _cached(alternative, stamp, make)
    index, record = make(), {"stamp": full_stamp}
    try:
        write_arrays(path, {name: getattr(index, name) for name in ARRAYS}, record | {"losses": index.losses})
    except OSError as error:
        warnings.warn(f"cannot cache an index, so every start scans the shards again: {error}", stacklevel=3)
    return index


def _joined(shards: Sequence[File], texts: Sequence[str]) -> Index:
    progress, indices = Progress(len(shards), "shards", "indexing: "), []
    with ThreadPoolExecutor(16) as pool:  # for object storage; reading headers from disk takes a single core anyway
        for index in pool.map(lambda shard: _in_memory(shard, texts), shards):
            indices.append(index)
            progress.step()
    columns = {name: [getattr(index, name) for index in indices] for name in ARRAYS}
    samples_before = np.cumsum([0, *map(len, indices)])
    bytes_before = np.cumsum([0, *map(len, columns["keys"])])
    columns["starts"] = [samples_before]
    columns["key_ends"] = [ends + before for ends, before in zip(columns["key_ends"], bytes_before, strict=False)]
    losses = {shard: index.losses[0] for shard, index in enumerate(indices) if index.losses}
    return Index(**{name: np.concatenate(arrays) for name, arrays in columns.items()}, losses=losses)


def _in_memory(shard: File, texts: Sequence[str]) -> Index:
    """Returns a copy of a shard's index, because Linux allows a process at most 65,530 mapped files."""
    index = _shard_index(shard, texts)
    return Index(**{name: np.array(getattr(index, name)) for name in ARRAYS}, losses=index.losses)


def _folder() -> Path:
    return cache_home() / "index"


def _path_beside(shard: File) -> Path:
    """Returns the path of the index beside the shard if that folder is writable, else in the home folder.

    The permission bits are checked too, because root can write to read-only folders.
    """
    if shard.path:
        path = shard.path.resolve()
        if os.access(path.parent, os.W_OK) and path.parent.stat().st_mode & 0o222:
            return path.with_name(f"{path.name}.index")
    return _path_in_home(shard)


def _path_in_home(shard: File) -> Path:
    address = str(shard.path.resolve() if shard.path else shard)
    return _folder() / f"{shard.stem[:100]}.{_digest(address)[:16]}.safetensors"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def scan(shard: File, texts: Sequence[str] = DEFAULT) -> Index:
    """Groups the members of a tar by key, in any order; the last of two members of the same name counts, as in tar.

    If the tar is truncated, its last sample is dropped if it lacks a member, and `losses` describes the truncation.
    """
    found, loss = shard.with_retries(lambda: _members(shard))
    groups: dict[str, dict[str, Member]] = {}
    for member in found:
        match = _KEY_AND_EXTENSION.fullmatch(member.name)
        if match and match[2].lower() in (*EXTENSIONS, *texts):
            groups.setdefault(match[1], {})[match[2].lower()] = member
    rows = [_row(group, texts) for group in groups.values()]
    if loss and groups and not _complete(rows[-1]):
        groups.popitem()
        rows.pop()
    keys = [key.encode("utf-8", "replace") for key in groups]
    return Index(
        starts=np.array([0, len(keys)]),
        spans=np.array(rows, np.int64).reshape(-1, 1 + len(texts), 2),
        hashes=np.array([zlib.crc32(key) for key in keys], np.uint32),
        keys=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        losses={0: f"{loss}; the {len(groups)} samples before that are used"} if loss else {},
    )


def _members(shard: File) -> tuple[list[Member], str]:
    with shard.open() as file:
        return members(file, shard.size, shard.url)


def _row(group: dict[str, Member], texts: Sequence[str]) -> list[tuple[int, int]]:
    missing = Member("", -1, 0)
    image = next((group[extension] for extension in EXTENSIONS if extension in group), missing)
    row = [image, *(group.get(extension, missing) for extension in texts)]
    return [(member.offset, member.size) for member in row]


def _complete(row: list[tuple[int, int]]) -> bool:
    image, *texts = (offset >= 0 for offset, _ in row)
    return image and any(texts)
