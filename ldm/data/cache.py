"""Latents on disk: the posterior's moments of shards of pictures, and a manifest of what made them.

NAME.safetensors holds, of the n readable samples of NAME.tar in their order, `moments` (n, 2z, h, w) float16,
`keys` and all `captions` as UTF-8 one after the other, where each ends, `key_ends` (n,) and `caption_ends` int64, and
how many captions there are up to each sample, `caption_groups` (n,); its metadata holds the shard's record. One file,
so that one rename makes all of a shard visible. hashes.npy holds the CRC-32 of every key, so that samples are split
without opening the shards. manifest.json comes last: without it a cache is not whole.
"""

import hashlib
import json
import os
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.captions import one_of
from ldm.data.mapped import map_arrays, write_arrays
from ldm.data.mapped import read_record as read_record  # of a shard of the cache
from ldm.data.picture import draw_and_index
from ldm.image import to_uint8
from ldm.progress import Progress

FORMAT = 2
MANIFEST, HASHES = "manifest.json", "hashes.npy"
ARRAYS = ("moments", "keys", "key_ends", "captions", "caption_ends", "caption_groups")
OPEN = 1000  # shards mapped at once: a process may have 65,530 mappings


class LatentSample(TypedDict):
    moments: Tensor  # float16 (2z, h, w)
    caption: str
    key: str
    id: int


class FirstStage(Protocol):
    @property
    def source(self) -> dict[str, Any]: ...

    @property
    def network(self) -> Any: ...


@dataclass(frozen=True)
class Shard:
    """A mapped file of the cache; `record` is {"settings", "source", "samples", "quarantined", "sha256"}."""

    moments: np.ndarray
    keys: np.ndarray
    key_ends: np.ndarray
    captions: np.ndarray
    caption_ends: np.ndarray
    caption_groups: np.ndarray
    record: dict[str, Any]

    def key(self, row: int) -> str:
        return _text(self.keys, self.key_ends, row)

    def captions_of(self, row: int) -> list[str]:
        first = self.caption_groups[row - 1] if row else 0
        return [_text(self.captions, self.caption_ends, k) for k in range(first, self.caption_groups[row])]


def _text(column: np.ndarray, ends: np.ndarray, row: int) -> str:
    return column[ends[row - 1] if row else 0 : ends[row]].tobytes().decode()


def _column(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    data = [text.encode("utf-8", "replace") for text in texts]  # JSON can hold half a surrogate pair
    return np.frombuffer(b"".join(data), np.uint8), np.cumsum([len(text) for text in data], dtype=np.int64)


def write_shard(
    path: Path, moments: np.ndarray, keys: Sequence[str], captions: Sequence[list[str]], record: dict[str, Any]
) -> None:
    """Atomically; the same samples and record give the same bytes. Of `captions` each sample has at least one."""
    groups = np.cumsum([len(one) for one in captions], dtype=np.int64)
    columns = (moments, *_column(keys), *_column([text for one in captions for text in one]), groups)
    arrays = dict(zip(ARRAYS, columns, strict=True))
    write_arrays(path, arrays, {**record, "samples": len(keys), "sha256": digest(arrays)})


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype.str} {list(array.shape)}".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def map_shard(path: Path) -> Shard:
    """Maps a shard into memory, of which pages are read when they are used. Raises ValueError if it is cut."""
    arrays, record = map_arrays(path, ARRAYS)
    return Shard(**arrays, record=record)


def key_hashes(cache: Path, names: Sequence[str]) -> np.ndarray:
    """The CRC-32 of every key in the shards named, (n,) uint32."""
    shards = (map_shard(cache / f"{name}.safetensors") for name in names)
    return np.array([zlib.crc32(s.key(row).encode()) for s in shards for row in range(len(s.key_ends))], np.uint32)


def read_manifest(cache: Path) -> dict[str, Any]:
    """{"format", "settings", "samples", "quarantined", "shards": [{"name", "samples", "sha256", …}]}."""
    path = cache / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{cache} holds no {MANIFEST}: give a folder that ldm encode has finished")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, of which this ldm knows only {FORMAT}")
        if not {"settings", "samples", "shards"} <= manifest.keys():
            raise ValueError("a part of it is missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of cached latents ({error}); run ldm encode again") from error
    return manifest


class CachedLatents(Dataset[LatentSample]):
    """The samples of a cache that `ldm encode` wrote, by index or (draw, index).

    Refused with ValueError where another first stage, scale or size made it than the run's. Of a cache that holds
    several sizes those of the run's size are used, with a warning, or all if the batches are `bucketed`. They are
    `mapped`, and so come through the page cache, or lie in `memory`, all read at the start. There is no `flip`, and no
    random crop: a mirrored latent is not the latent of the mirrored picture. Of several captions each draw has one,
    keyed by the `seed`.
    """

    def __init__(
        self,
        cache: str | Path,
        first_stage: FirstStage,
        size: Sequence[int],
        bucketed: bool = False,
        load: Literal["mapped", "memory"] = "mapped",
        seed: int = 0,
    ) -> None:
        self.cache, self.seed = Path(cache), seed
        manifest = read_manifest(self.cache)
        config = first_stage.network.config
        run = {"first_stage": first_stage.source["fingerprint"], "scale": config["scale"], "resolution": list(size)}
        check_settings(self.cache, manifest["settings"], run)
        shards = manifest["shards"]
        self.counts = np.array([shard["samples"] for shard in shards], np.int64)
        self.used = np.array([bucketed or shard.get("size", [*size]) == [*size] for shard in shards], bool)
        self.names = [shard["name"] for shard, used in zip(shards, self.used, strict=True) if used]
        self.sizes = [tuple(s.get("size", size)) for s, used in zip(shards, self.used, strict=True) if used]
        self.starts = [0, *accumulate(self.counts[self.used].tolist())]
        self.mapped: dict[int, tuple[Tensor, Shard]] = {}
        if len(self) < self.counts.sum():
            warnings.warn(
                f"of the {self.counts.sum()} samples in {self.cache}, {len(self)} are {size[0]}x{size[1]} and used; "
                "data.bucketed=true trains on all",
                stacklevel=2,
            )
        if not len(self):
            raise ValueError(f"the cache {self.cache} holds no samples")
        if load not in ("mapped", "memory"):
            raise ValueError(f"data.load={load}: expected mapped or memory")
        if load == "memory":
            self._fill()

    def _fill(self) -> None:
        """Reads all shards, several at once. Raises ValueError where there is not the memory for them."""
        needed = sum((self.cache / f"{name}.safetensors").stat().st_size for name in self.names)
        free = available_memory()
        if needed > free:
            raise ValueError(
                f"{self.cache} takes {needed / 2**30:.1f} GiB in memory, of which {free / 2**30:.1f} GiB is free: "
                "set data.load=mapped"
            )
        progress = Progress(len(self), "latents", "loading: ")
        with ThreadPoolExecutor(8) as pool:
            for number, shard in enumerate(pool.map(self._read, range(len(self.names)))):
                self.mapped[number] = torch.from_numpy(shard.moments), shard
                progress.step(len(shard.moments))

    def _read(self, index: int) -> Shard:
        shard = self._open(index)
        return Shard(**{name: np.array(getattr(shard, name)) for name in ARRAYS}, record=shard.record)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int | tuple[int, int]) -> LatentSample:
        draw, position = draw_and_index(index, len(self))
        shard = self._shard(position)
        row = position - self.starts[shard]
        moments, texts = self._map(shard)
        caption = one_of(texts.captions_of(row), self.seed, position, draw)
        return {"moments": moments[row], "caption": caption, "key": texts.key(row), "id": position}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mapped": {}}  # a spawned worker maps the files itself

    def key(self, index: int) -> str:
        shard = self._shard(index)
        return self._map(shard)[1].key(index - self.starts[shard])

    @property
    def hashes(self) -> np.ndarray:
        """The CRC-32 of every key, (n,) uint32: as ldm encode has kept them, or else read from the shards."""
        path = self.cache / HASHES
        if not path.is_file():
            return key_hashes(self.cache, self.names)
        hashes = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(hashes) != self.counts.sum():
            raise ValueError(f"{path} is not of this cache's samples; delete it and run ldm encode again")
        return hashes if self.used.all() else hashes[np.repeat(self.used, self.counts)]

    @property
    def buckets(self) -> np.ndarray:
        """The number of every sample's size, (n,)."""
        numbers = {size: number for number, size in enumerate(sorted(set(self.sizes)))}
        return np.repeat([numbers[size] for size in self.sizes], np.diff(self.starts))

    def _shard(self, position: int) -> int:
        return bisect_right(self.starts, position) - 1

    def _map(self, index: int) -> tuple[Tensor, Shard]:
        if index not in self.mapped:
            shard = self._open(index)
            if len(self.mapped) >= OPEN:
                del self.mapped[next(iter(self.mapped))]
            self.mapped[index] = torch.from_numpy(shard.moments), shard
        return self.mapped[index]

    def _open(self, index: int) -> Shard:
        shard = map_shard(self.cache / f"{self.names[index]}.safetensors")
        expected = self.starts[index + 1] - self.starts[index]
        if len(shard.moments) != expected:
            raise ValueError(
                f"{self.names[index]} in {self.cache} holds {len(shard.moments)} samples, its manifest says "
                f"{expected}; run ldm encode again"
            )
        return shard


def available_memory() -> int:
    """Bytes that can be had without swapping; all of the machine's where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_settings(cache: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError where one of the `wanted` settings is not what the cache was made with."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{cache} was encoded with {name} {_short(found.get(name))}, not {_short(value)}: "
                "give the same, or encode the shards again into another folder"
            )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


class Decoded(Dataset[dict[str, Any]]):
    """`dataset` of moments as pictures again: what the first stage makes of the posterior's means.

    FID against these does not see what the first stage itself loses.
    """

    def __init__(self, dataset: Dataset[LatentSample], first_stage: FirstStage) -> None:
        self.dataset, self.network = dataset, first_stage.network

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @torch.no_grad()
    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        latents = self.network.latents(sample["moments"].float()[None])
        return {**sample, "image": to_uint8(self.network.decode(latents))[0]}
