"""Splits and repeats small data sets, and validates on the training images if there are too few to hold any out."""

from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from ldm.data.sources.split import Keyed

Sample = dict[str, Any]
OTHER = 1 << 40  # added to sample ids, which key the noise; larger than the id of any training sample


class SmallSplit(Dataset[Sample]):
    """The samples of `part`, "train" or "held_out"; n // `every` of n samples are held out.

    The samples with the smallest key hashes are held out. With fewer than `every` samples, none is held out and both
    parts contain all samples. Unlike in Split, the sizes of the parts are exact.
    """

    def __init__(self, dataset: Keyed, part: Literal["train", "held_out"], every: int = 16) -> None:
        if part not in ("train", "held_out"):
            raise ValueError(f"part={part!r}: expected train or held_out")
        if every < 2:
            raise ValueError(f"data.held_out_every={every}: expected 2 or more, to leave images to train on")
        self.dataset, self.total = dataset, len(dataset)
        held_out, rest = np.split(np.argsort(dataset.hashes, kind="stable"), [self.total // every])
        self.apart = len(held_out) > 0
        self.indices = np.sort(held_out if part == "held_out" and self.apart else rest)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        draw, index = key if isinstance(key, tuple) else (0, key)
        return self.dataset[draw, int(self.indices[index])]

    @property
    def buckets(self) -> np.ndarray:
        return np.asarray(self.dataset.buckets)[self.indices]  # type: ignore[attr-defined]

    @property
    def note(self) -> str:
        """A human-readable note on how the part relates to the training images."""
        if self.apart:
            return f"{len(self)} of {self.total} images, held out from training"
        return f"all {self.total} images, which are also trained on, at other noise"


class Noises(Dataset[Sample]):
    """Repeats every sample `count` times under different ids, so that a validation loss averages over more noise.

    The ids differ from those of training samples, so that validation never uses the noise of a training step.
    """

    def __init__(self, dataset: Dataset[Sample], count: int) -> None:
        if count < 1:
            raise ValueError(f"data.noises={count}: expected at least 1 draw of noise per validation image")
        self.dataset, self.count = dataset, count

    def __len__(self) -> int:
        return self.count * len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index = key[1] if isinstance(key, tuple) else key
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {**self.dataset[index // self.count], "id": OTHER + index}

    @property
    def buckets(self) -> np.ndarray:
        return np.repeat(np.asarray(self.dataset.buckets), self.count)  # type: ignore[attr-defined]


class Repeated(Dataset[Sample]):
    """Repeats the complete data set, each time as another draw, until an epoch has at least `at_least` samples."""

    def __init__(self, dataset: Dataset[Sample], at_least: int) -> None:
        self.dataset, self.size = dataset, len(dataset)  # type: ignore[arg-type]
        self.times = max(1, -(-at_least // self.size))

    def __len__(self) -> int:
        return self.times * self.size

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        draw, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(index)
        turn, inner = divmod(index, self.size)
        return {**self.dataset[draw * self.times + turn, inner], "id": index}

    @property
    def buckets(self) -> np.ndarray:
        return np.tile(np.asarray(self.dataset.buckets), self.times)  # type: ignore[attr-defined]


def note_of(dataset: object) -> str | None:
    """Returns the note of the SmallSplit inside a data set, if there is one."""
    while dataset is not None and not isinstance(dataset, SmallSplit):
        dataset = vars(dataset).get("dataset")
    return None if dataset is None else dataset.note
