"""The samples of shards: which bytes are the picture and which its texts. Scanned once, then kept on disk."""

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
from ldm.progress import Progress

VERSION = 3
ARRAYS = ("starts", "spans", "hashes", "keys", "key_ends")
# The rule of webdataset: the key is everything up to the first dot of the last part of the name.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


@dataclass(frozen=True)
class Index:
    """A row a sample, shard after shard; shard k has the rows from starts[k] (s + 1,) to before starts[k + 1].

    spans (n, 1 + t, 2) int64 are offset and size of the picture and of the texts with each of t extensions, an offset
    of -1 where the shard has none; hashes (n,) uint32 are the keys' CRC-32; keys are UTF-8, one after the other, each
    to before key_ends (n,). losses say in words what could not be read of a shard, by its number.
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
        """Whether any sample has a picture, and a text with each extension, (1 + t,) bool."""
        return np.any(self.spans[..., 0] >= 0, axis=0)

    def texts(self, row: int, captions: Captions) -> Sequence[tuple[str, tuple[int, int]]]:
        """Extension, and offset and size, of those to read for `captions`, of whose extensions the index must be."""
        named = zip(captions.extensions, self.spans[row, 1:].tolist(), strict=True)
        return captions.needed([(extension, (offset, size)) for extension, (offset, size) in named if offset >= 0])

    def shard(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, "right")) - 1

    def key(self, row: int) -> str:
        return self.keys[self.key_ends[row - 1] if row else 0 : self.key_ends[row]].tobytes().decode()


def load_index(shards: Sequence[File], texts: Sequence[str] = DEFAULT) -> Index:
    """Of all shards, mapped from one file in ~/.cache/ldm/index while none of them has changed; `texts` are extensions.

    Otherwise put together from each one's own index, in a file beside the shard, or in that folder where the shard
    is in object storage, where its own cannot be written, or where a file of another kind has that name.
    """
    if len(shards) == 1:
        return _shard_index(shards[0], texts)
    stamp = _digest(*texts, *(f"{shard} {shard.size} {shard.stamp}" for shard in shards))
    return _kept(_folder() / f"{len(shards)}-shards.{stamp[:32]}.safetensors", stamp, lambda: _joined(shards, texts))


def _shard_index(shard: File, texts: Sequence[str]) -> Index:
    stamp = f"{shard.size} {shard.stamp} {' '.join(texts)}"
    return _kept(_beside(shard), stamp, lambda: scan(shard, texts), otherwise=_at_home(shard))


def _kept(path: Path, stamp: str, make: Callable[[], Index], otherwise: Path | None = None) -> Index:
    """The index at `path`, if it has the stamp; otherwise what `make` gives, kept there for the next time.

    A file at `path` that is no index is left as it is, and `otherwise` takes the place of `path`, if given.
    """
    full_stamp = f"{VERSION} {stamp}"
    try:
        arrays, record = map_arrays(path, ARRAYS)
        if record["stamp"] == full_stamp:
            return Index(**arrays, losses={int(shard): loss for shard, loss in record["losses"].items()})
    except (OSError, ValueError, KeyError):  # absent, or damaged: it is made anew
        if otherwise and path.exists() and not is_array_file(path):
            return _kept(otherwise, stamp, make)
    index, record = make(), {"stamp": full_stamp}
    try:
        write_arrays(path, {name: getattr(index, name) for name in ARRAYS}, record | {"losses": index.losses})
    except OSError as error:
        warnings.warn(f"an index is not kept, so each start scans the shards again: {error}", stacklevel=3)
    return index


def _joined(shards: Sequence[File], texts: Sequence[str]) -> Index:
    progress, indices = Progress(len(shards), "shards", "indexing: "), []
    with ThreadPoolExecutor(16) as pool:  # for object storage: reading tars' headers from disk keeps one core busy
        for index in pool.map(lambda shard: _in_memory(shard, texts), shards):
            indices.append(index)
            progress.step()
    columns = {name: [getattr(index, name) for index in indices] for name in ARRAYS}
    samples = np.cumsum([0, *map(len, indices)])
    letters = np.cumsum([0, *map(len, columns["keys"])])
    columns["starts"] = [samples]
    columns["key_ends"] = [ends + before for ends, before in zip(columns["key_ends"], letters, strict=False)]
    losses = {shard: index.losses[0] for shard, index in enumerate(indices) if index.losses}
    return Index(**{name: np.concatenate(arrays) for name, arrays in columns.items()}, losses=losses)


def _in_memory(shard: File, texts: Sequence[str]) -> Index:
    """Copied, because a process may have no more than 65,530 mapped files."""
    index = _shard_index(shard, texts)
    return Index(**{name: np.array(getattr(index, name)) for name in ARRAYS}, losses=index.losses)


def _folder() -> Path:
    return Path.home() / ".cache" / "ldm" / "index"


def _beside(shard: File) -> Path:
    """Root may write anywhere, so the folder's own permission bits are asked as well."""
    if shard.path:
        path = shard.path.resolve()
        if os.access(path.parent, os.W_OK) and path.parent.stat().st_mode & 0o222:
            return path.with_name(f"{path.name}.index")
    return _at_home(shard)


def _at_home(shard: File) -> Path:
    address = str(shard.path.resolve() if shard.path else shard)
    return _folder() / f"{shard.stem[:100]}.{_digest(address)[:16]}.safetensors"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def scan(shard: File, texts: Sequence[str] = DEFAULT) -> Index:
    """Group the members by key, whatever their order; the last of two members of one name counts, as in tar.

    Of a tar cut short, the last sample is left out where it lost a member, and the loss says so.
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
        losses={0: f"{loss}: its {len(groups)} samples before that are used"} if loss else {},
    )


def _members(shard: File) -> tuple[list[Member], str]:
    with shard.open() as file:
        return members(file, shard.size, shard.url)


def _row(group: dict[str, Member], texts: Sequence[str]) -> list[tuple[int, int]]:
    nothing = Member("", -1, 0)
    picture = next((group[extension] for extension in EXTENSIONS if extension in group), nothing)
    found = [picture, *(group.get(extension, nothing) for extension in texts)]
    return [(member.offset, member.size) for member in found]


def _complete(row: list[tuple[int, int]]) -> bool:
    picture, *texts = (offset >= 0 for offset, _ in row)
    return picture and any(texts)
