"""The samples of one shard: which bytes are the picture and which the caption. Scanned once, then cached."""

import hashlib
import os
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.picture import EXTENSIONS
from ldm.data.tar import Member, members
from ldm.files import atomic_write

VERSION = 1
CAPTIONS = ("txt", "json")
# The rule of webdataset: the key is everything up to the first dot of the last part of the name.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


@dataclass(frozen=True)
class ShardIndex:
    """A row a sample: keys (n,) and spans (n, 4) int64 of picture offset, size, caption offset, size.

    An offset of -1 says that the shard has no such member. `extensions` (n,) is the caption's, "txt" or "json".
    `loss` says in words what could not be read of the tar, or is empty.
    """

    keys: np.ndarray
    spans: np.ndarray
    extensions: np.ndarray
    loss: str


def load_index(shard: Path) -> ShardIndex:
    """From the cache file beside the shard, or in ~/.cache/ldm/index, while the shard has not changed."""
    stat = shard.stat()
    stamp = np.array([VERSION, stat.st_size, stat.st_mtime_ns])
    cache = _cache_file(shard)
    try:
        with np.load(cache, allow_pickle=False) as stored:
            if np.array_equal(stored["stamp"], stamp):
                return ShardIndex(stored["keys"], stored["spans"], stored["extensions"], str(stored["loss"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # absent, or cut: it is made anew
    index = scan(shard)
    fields: dict[str, Any] = {"stamp": stamp, **vars(index)}
    try:
        atomic_write(cache, lambda file: np.savez(file, **fields))
    except OSError as error:
        warnings.warn(f"the index of {shard} is not kept, so each start scans the tar again: {error}", stacklevel=2)
    return index


def _cache_file(shard: Path) -> Path:
    """Root may write anywhere, so the folder's own permission bits are asked as well."""
    shard = shard.resolve()
    folder = shard.parent
    if os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222:
        return folder / f"{shard.name}.index.npz"
    digest = hashlib.sha256(os.fsencode(shard)).hexdigest()[:16]
    return Path.home() / ".cache" / "ldm" / "index" / f"{shard.name}.{digest}.npz"


def scan(shard: Path) -> ShardIndex:
    """Group the members by key, whatever their order; the last of two members of one name counts, as in tar.

    Of a tar cut short, the last sample is left out where it lost a member, and `loss` says so.
    """
    found, loss = members(shard)
    groups: dict[str, dict[str, Member]] = {}
    for member in found:
        match = _KEY_AND_EXTENSION.fullmatch(member.name)
        if match and match[2].lower() in (*EXTENSIONS, *CAPTIONS):
            groups.setdefault(match[1], {})[match[2].lower()] = member
    if loss and groups and not _complete(groups[last := next(reversed(groups))]):
        del groups[last]
    rows = [_row(group) for group in groups.values()]
    return ShardIndex(
        keys=np.array([key.encode("utf-8", "replace") for key in groups], dtype=bytes),
        spans=np.array([row[0] for row in rows], dtype=np.int64).reshape(-1, 4),
        extensions=np.array([row[1] for row in rows], dtype="U4"),
        loss=f"{loss}: its {len(groups)} samples before that are used" if loss else "",
    )


def _complete(group: dict[str, Member]) -> bool:
    return any(e in group for e in EXTENSIONS) and any(e in group for e in CAPTIONS)


def _row(group: dict[str, Member]) -> tuple[tuple[int, int, int, int], str]:
    nothing = Member("", -1, 0)
    picture = next((group[e] for e in EXTENSIONS if e in group), nothing)
    extension = next((e for e in CAPTIONS if e in group), "")
    caption = group.get(extension, nothing)
    return (picture.offset, picture.size, caption.offset, caption.size), extension
