"""Splits a data set into training and validation samples."""

from typing import Any, Literal, Protocol

import numpy as np
from torch.utils.data import Dataset

Sample = dict[str, Any]


class Keyed(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int | tuple[int, int]) -> Any: ...

    @property
    def hashes(self) -> np.ndarray: ...

    def key(self, index: int) -> str: ...


class Split(Dataset[Sample]):
    """The samples of `part`, "train" or "held_out", of which the latter has about one in `every` samples.

    A hash of the key decides, so samples keep their part when shards are added or reordered. Takes 8 bytes of memory
    per sample.
    """

    def __init__(self, dataset: Keyed, part: Literal["train", "held_out"], every: int = 16) -> None:
        if part not in ("train", "held_out"):
            raise ValueError(f"part={part!r}: expected train or held_out")
        if every < 2:
            raise ValueError(f"data.held_out_every={every}: expected 2 or more, to leave both parts some samples")
        self.dataset = dataset
        self.indices = np.flatnonzero((dataset.hashes % np.uint32(every) == 0) == (part == "held_out"))
        if not len(self.indices):
            change = "lower" if part == "held_out" else "raise"
            raise ValueError(
                f"none of {len(dataset)} samples is {part}; add data, or {change} data.held_out_every={every}"
            )

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
