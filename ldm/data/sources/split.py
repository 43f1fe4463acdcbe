"""Splits a data set into training and validation samples."""

from typing import Any, Literal, Protocol, get_args

import numpy as np
from torch.utils.data import Dataset

Sample = dict[str, Any]
SplitHash = Literal["mixed", "crc32"]


class Keyed(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int | tuple[int, int]) -> Any: ...

    @property
    def hashes(self) -> np.ndarray:
        """The CRC-32 of every key, (n,) uint32."""

    @property
    def split_hash(self) -> SplitHash:
        """The hash by which this data must be split: "crc32" for a cache older than "mixed"."""

    def key(self, index: int) -> str: ...


class Split(Dataset[Sample]):
    """The samples of `part`, "train" or "held_out"; about one in `every` samples is held out.

    A hash of the key decides, so that samples keep their part when shards are added or reordered. If this would hold
    out no sample, the one with the smallest hash is held out; if it would hold out all, the one with the largest is
    not. `split_hash` is "mixed", or "crc32" as in earlier runs and caches, which distributes numbered keys unevenly.
    Uses 8 bytes of memory per sample. Raises ValueError for invalid settings and for a single sample.
    """

    def __init__(
        self,
        dataset: Keyed,
        part: Literal["train", "held_out"],
        every: int = 16,
        split_hash: SplitHash = "mixed",
    ) -> None:
        if part not in ("train", "held_out"):
            raise ValueError(f"part={part!r}: expected train or held_out")
        if every < 2:
            raise ValueError(f"data.held_out_every={every}: expected 2 or more, to leave both parts some samples")
        if split_hash not in get_args(SplitHash):
            raise ValueError(f"data.split_hash={split_hash}: expected one of {', '.join(get_args(SplitHash))}")
        if len(dataset) < 2:
            raise ValueError(
                f"{len(dataset)} sample cannot be split into training and held-out samples: give at least 2"
            )
        self.dataset = dataset
        is_mixed = (split_hash, dataset.split_hash) == ("mixed", "mixed")
        held_out = _held_out(mix(dataset.hashes) if is_mixed else dataset.hashes, every)
        self.indices = np.flatnonzero(held_out == (part == "held_out"))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        draw, index = key if isinstance(key, tuple) else (0, key)
        return self.dataset[draw, int(self.indices[index])]

    def key(self, index: int) -> str:
        return self.dataset.key(int(self.indices[index]))

    @property
    def buckets(self) -> np.ndarray:
        """The bucket of every sample, (n,), for a data set of several image sizes."""
        return np.asarray(self.dataset.buckets)[self.indices]  # type: ignore[attr-defined]

    def group(self, index: int) -> range:
        """Returns the samples that may replace a bad one: all of this part."""
        return range(len(self))


def mix(hashes: np.ndarray) -> np.ndarray:
    """Mixes the bits of each hash, (n,) uint32, with the finalizer of MurmurHash3 (Appleby 2011).

    Because a CRC is linear, the low bits of the CRCs of numbered keys take few values or follow a pattern.
    """
    x = np.array(hashes, np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _held_out(hashes: np.ndarray, every: int) -> np.ndarray:
    """Returns whether each sample is held out, (n,) bool; at least one is, and at least one is not.

    Samples with equal keys stay together, unless all keys are equal.
    """
    chosen = hashes % np.uint32(every) == 0
    if not chosen.any():
        chosen = hashes == hashes.min()
    if chosen.all():
        chosen = hashes != hashes.max()
    if not chosen.any():
        chosen[0] = True
    return chosen
