"""Latents on disk: shards of them, and a manifest of what made them.

NAME.safetensors holds what became of NAME.tar, see ldm/data/latents/shard.py. hashes.npy holds the CRC-32 of every key,
so that samples are split without opening the shards. manifest.json comes last: without it a cache is not whole.
"""

import json
import os
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NotRequired, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.latents.shard import Shard, key_hashes, map_shard
from ldm.data.sources.captions import choose_caption
from ldm.data.sources.image import draw_and_index
from ldm.image import to_uint8
from ldm.progress import Progress

FORMAT = 2
MANIFEST, HASHES = "manifest.json", "hashes.npy"
OPEN = 1000  # shards mapped at once: a process may have 65,530 mappings


class LatentSample(TypedDict):
    moments: Tensor  # float16 (2z, h, w)
    caption: str
    key: str
    id: int
    states: NotRequired[Tensor]  # (tokens, d) of the caption


class Frozen(Protocol):
    """A network that is not trained, and where its weights came from."""

    @property
    def source(self) -> dict[str, Any]: ...

    @property
    def network(self) -> Any: ...


def text_settings(text: Frozen) -> dict[str, Any]:
    """What decides the states of a caption."""
    return {"text_encoder": text.source["fingerprint"], **text.network.settings}


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


def is_manifest(path: Path) -> bool:
    """Whether the file is a manifest of cached latents, of whatever format."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format", "settings", "samples", "shards"} <= manifest.keys()


class CachedLatents(Dataset[LatentSample]):
    """The samples of a cache that `ldm encode` wrote, by index or (draw, index).

    Refused with ValueError where another first stage, scale or size made it than the run's. Of a cache that holds
    several sizes those of the run's size are used, with a warning, or all if the batches are `bucketed`. They are
    `mapped`, and so come through the page cache, or lie in `memory`, all read at the start. There is no `flip`, and no
    random crop: a mirrored latent is not the latent of the mirrored picture. Of several captions each draw has one,
    keyed by the `seed`; given a `text_encoder`, with its states, which must be what the cache holds.
    """

    def __init__(
        self,
        cache: str | Path,
        first_stage: Frozen,
        size: Sequence[int],
        bucketed: bool = False,
        load: Literal["mapped", "memory"] = "mapped",
        seed: int = 0,
        text_encoder: Frozen | None = None,
    ) -> None:
        self.cache, self.seed, self.with_states = Path(cache), seed, text_encoder is not None
        manifest = read_manifest(self.cache)
        config = first_stage.network.config
        run = {"first_stage": first_stage.source["fingerprint"], "scale": config["scale"], "resolution": list(size)}
        if text_encoder is not None:
            if "text_encoder" not in manifest["settings"]:
                raise ValueError(
                    f"{cache} holds no states of captions: set data=latents, or encode the shards again into another "
                    "folder, with ldm encode --text-encoder"
                )
            run |= text_settings(text_encoder)
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
        shards = (self._open(index) for index in range(len(self.names)))
        needed = sum(array.nbytes for shard in shards for array in shard.arrays.values())
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
        copies: dict[str, Any] = {name: np.array(array) for name, array in shard.arrays.items()}
        return replace(shard, **copies)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int | tuple[int, int]) -> LatentSample:
        draw, position = draw_and_index(index, len(self))
        shard = self._shard(position)
        row = position - self.starts[shard]
        moments, texts = self._map(shard)
        number = choose_caption(texts.numbers(row), self.seed, position, draw)
        sample: LatentSample = {
            "moments": moments[row],
            "caption": texts.caption(number),
            "key": texts.key(row),
            "id": position,
        }
        if texts.states is not None:
            sample["states"] = torch.from_numpy(texts.states[number])
        return sample

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
        return shard if self.with_states else replace(shard, states=None)


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

    def __init__(self, dataset: Dataset[LatentSample], first_stage: Frozen) -> None:
        self.dataset, self.network = dataset, first_stage.network

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @torch.no_grad()
    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        latents = self.network.latents(sample["moments"].float()[None])
        return {**sample, "image": to_uint8(self.network.decode(latents))[0]}
