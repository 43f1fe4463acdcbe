"""Reads cached latents: shards on disk and the manifest of what encoded them.

NAME.safetensors holds the latents of NAME.tar, see ldm/data/latents/shard.py. hashes.npy holds the CRC-32 of every key,
so that samples are split without opening the shards. manifest.json is written last: a cache without it is incomplete.
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
from ldm.data.sources.split import SplitHash
from ldm.image import to_uint8
from ldm.progress import Progress

FORMAT = 2
MANIFEST, HASHES = "manifest.json", "hashes.npy"
MAX_MAPPED = 1000  # shards mapped at the same time: Linux allows a process 65,530 mappings


class LatentSample(TypedDict):
    moments: Tensor  # float16 (2z, h, w)
    caption: str
    key: str
    id: int
    states: NotRequired[Tensor]  # (tokens, d), the text encoder's states of the caption


class Frozen(Protocol):
    """A frozen network and the source of its weights."""

    @property
    def source(self) -> dict[str, Any]: ...

    @property
    def network(self) -> Any: ...


def text_settings(text: Frozen) -> dict[str, Any]:
    """Returns the settings that determine the states of a caption."""
    return {"text_encoder": text.source["fingerprint"], **text.network.settings}


def read_manifest(cache: Path) -> dict[str, Any]:
    """Reads {"format", "split_hash", "settings", "samples", "quarantined", "shards": [{"name", "samples", …}]}.

    Raises FileNotFoundError if there is no manifest, ValueError if it is not one that this version reads.
    """
    path = cache / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{cache} has no {MANIFEST}: give a folder in which ldm encode has finished")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"it has format {manifest['format']}, but this version of ldm reads only {FORMAT}")
        if not {"settings", "samples", "shards"} <= manifest.keys():
            raise ValueError("it lacks settings, samples or shards")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of cached latents ({error}); run ldm encode again") from error
    return manifest


def split_hash(manifest: dict[str, Any]) -> SplitHash:
    """Returns how the cache is split, which earlier caches do not record."""
    return "mixed" if manifest.get("split_hash") == "mixed" else "crc32"


class CachedLatents(Dataset[LatentSample]):
    """The samples of a cache that `ldm encode` wrote, by index or (draw, index).

    If a cache holds several sizes, only samples of the run's size are used, with a warning for this `purpose`, or all
    samples if batches are `bucketed`. With load="mapped" latents are read through the page cache, with "memory" all
    are read at the start. There is no `flip` and no random crop, because a mirrored latent is not the latent of the
    mirrored image. If a sample has several captions, each draw gets one, keyed by `seed`. With a `text_encoder`,
    samples hold its states from the cache. Raises ValueError if the cache was encoded with another first stage,
    scale, size or text encoder.
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
        purpose: Literal["training", "reference"] = "training",
    ) -> None:
        self.cache, self.seed, self.with_states = Path(cache), seed, text_encoder is not None
        manifest = read_manifest(self.cache)
        config = first_stage.network.config
        run = {"first_stage": first_stage.source["fingerprint"], "scale": config["scale"], "resolution": list(size)}
        if text_encoder is not None:
            if "text_encoder" not in manifest["settings"]:
                raise ValueError(
                    f"{cache} has no caption states: set data=latents, or encode the shards again into another "
                    "folder with ldm encode --text-encoder"
                )
            run |= text_settings(text_encoder)
        check_settings(self.cache, manifest["settings"], run)
        self.split_hash = split_hash(manifest)
        shards = manifest["shards"]
        self.counts = np.array([shard["samples"] for shard in shards], np.int64)
        self.used = np.array([bucketed or shard.get("size", [*size]) == [*size] for shard in shards], bool)
        self.names = [shard["name"] for shard, used in zip(shards, self.used, strict=True) if used]
        self.sizes = [tuple(s.get("size", size)) for s, used in zip(shards, self.used, strict=True) if used]
        self.starts = [0, *accumulate(self.counts[self.used].tolist())]
        self.mapped: dict[int, tuple[Tensor, Shard]] = {}
        if len(self) < self.counts.sum():
            used = f"only the {len(self)} samples of size {size[0]}x{size[1]} are used"
            consequence = {
                "training": "; set data.bucketed=true to train on all",
                "reference": " as references, because generated images have this size",
            }
            warnings.warn(f"{used}, of {self.counts.sum()} in {cache}{consequence[purpose]}", stacklevel=2)
        if not len(self):
            raise ValueError(
                f"the cache {self.cache} has no samples to use: encode shards of {size[0]}x{size[1]} images"
            )
        if load not in ("mapped", "memory"):
            raise ValueError(f"data.load={load}: expected mapped or memory")
        if load == "memory":
            self._fill()

    def _fill(self) -> None:
        """Reads all shards into memory in parallel. Raises ValueError if they do not fit."""
        shards = (self._open(index) for index in range(len(self.names)))
        needed = sum(array.nbytes for shard in shards for array in shard.arrays.values())
        free = available_memory()
        if needed > free:
            raise ValueError(
                f"{self.cache} needs {needed / 2**30:.1f} GiB of memory, but only {free / 2**30:.1f} GiB is available: "
                "set data.load=mapped"
            )
        progress = Progress(len(self), "latents", "loading: ")
        with ThreadPoolExecutor(8) as pool:
            for index, shard in enumerate(pool.map(self._read, range(len(self.names)))):
                self.mapped[index] = torch.from_numpy(shard.moments), shard
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
        caption = choose_caption(texts.caption_numbers(row), self.seed, position, draw)
        sample: LatentSample = {
            "moments": moments[row],
            "caption": texts.caption(caption),
            "key": texts.key(row),
            "id": position,
        }
        if texts.states is not None:
            sample["states"] = torch.from_numpy(texts.states[caption])
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mapped": {}}  # spawned workers map the files themselves

    def key(self, index: int) -> str:
        shard = self._shard(index)
        return self._map(shard)[1].key(index - self.starts[shard])

    @property
    def hashes(self) -> np.ndarray:
        """The CRC-32 of every key, (n,) uint32, from hashes.npy if it exists, else computed from the shards."""
        path = self.cache / HASHES
        if not path.is_file():
            return key_hashes(self.cache, self.names)
        try:
            hashes = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is truncated or corrupt; run ldm encode again, which writes it again") from error
        if len(hashes) != self.counts.sum():
            raise ValueError(
                f"{path} has {len(hashes)} hashes, but the cache has {self.counts.sum()} samples; "
                "run ldm encode again, which writes it again"
            )
        return hashes if self.used.all() else hashes[np.repeat(self.used, self.counts)]

    @property
    def buckets(self) -> np.ndarray:
        """The bucket of every sample, (n,): the index of its size among all sizes of the cache."""
        numbers = {size: number for number, size in enumerate(sorted(set(self.sizes)))}
        return np.repeat([numbers[size] for size in self.sizes], np.diff(self.starts))

    def _shard(self, position: int) -> int:
        return bisect_right(self.starts, position) - 1

    def _map(self, index: int) -> tuple[Tensor, Shard]:
        if index not in self.mapped:
            shard = self._open(index)
            if len(self.mapped) >= MAX_MAPPED:
                del self.mapped[next(iter(self.mapped))]
            self.mapped[index] = torch.from_numpy(shard.moments), shard
        return self.mapped[index]

    def _open(self, index: int) -> Shard:
        shard = map_shard(self.cache / f"{self.names[index]}.safetensors")
        expected = self.starts[index + 1] - self.starts[index]
        if len(shard.moments) != expected:
            raise ValueError(
                f"{self.names[index]} in {self.cache} has {len(shard.moments)} samples, but the manifest lists "
                f"{expected}; run ldm encode again"
            )
        return shard if self.with_states else replace(shard, states=None)


def available_memory() -> int:
    """Returns the bytes available without swapping, or the machine's total memory if /proc/meminfo does not list it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_settings(cache: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError if the cache was encoded with another value of one of the `wanted` settings."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{cache} was encoded with {name} {_short(found.get(name))}, not {_short(value)}: "
                "use the same value, or encode the shards again into another folder"
            )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


class Decoded(Dataset[dict[str, Any]]):
    """Decodes a `dataset` of moments to images: the first stage applied to the means of the posterior.

    FID against these images does not include the reconstruction error of the first stage. It runs on `device`, by
    default on a GPU if there is one, where `__getitems__` decodes all samples at once; on a CPU the samples of a batch
    do not affect each other.
    """

    def __init__(self, dataset: Dataset[LatentSample], first_stage: Frozen, device: torch.device | None = None) -> None:
        self.dataset, self.network = dataset, first_stage.network
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    @torch.no_grad()
    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        samples = [self.dataset[index] for index in indices]
        network = self.network.to(self.device)
        moments = torch.stack([sample["moments"] for sample in samples]).float().to(self.device)
        batches = moments.split(1 if self.device.type == "cpu" else len(samples))
        images = [image for batch in batches for image in to_uint8(network.decode(network.latents(batch))).cpu()]
        return [{**sample, "image": image} for sample, image in zip(samples, images, strict=True)]


def undecoded(dataset: Any) -> Any:
    """Returns the data set that a `Decoded` one decodes, and any other as it is, to read captions without images."""
    return dataset.dataset if isinstance(dataset, Decoded) else dataset
