"""Encodes the images of a data set once and keeps their latents in memory, and on disk for the next run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.latents.store import Identified, LatentStore, store_folder
from ldm.progress import Progress

Sample = dict[str, Any]


class InMemory(Dataset[Sample]):
    """The first `count` samples of `dataset`, with "moments" in place of "image".

    `encode` maps uint8 images (b, 3, h, w) to moments (b, 2z, h / f, w / f). Images are encoded in batches, when `load`
    is called or a sample of the batch is read, so that a run can be refused before it encodes them all. `store` is the
    folder that keeps the encoded data set for later runs if `dataset` and `encode` have an identity; "auto" is
    `ldm.files.cache_home`, None keeps nothing.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        encode: Callable[[Tensor], Tensor],
        count: int,
        batch_size: int = 256,
        store: str | None = None,
    ) -> None:
        if count < 1:
            raise ValueError(f"data.count={count}: expected at least 1 sample to encode")
        self.dataset, self.encode, self.count, self.batch_size = dataset, encode, count, batch_size
        self.batches: dict[int, tuple[Tensor, list[Sample]]] = {}
        self.store: LatentStore | None = None
        folder = store_folder(store)
        if folder is not None and isinstance(dataset, Identified) and isinstance(encode, Identified):
            self.store = LatentStore(folder, dataset, encode, count, batch_size)

    def load(self) -> None:
        """Reads all samples from the store, or encodes those that are not encoded yet and stores them."""
        starts = range(0, self.count, self.batch_size)
        if len(self.batches) == len(starts) or self._read():
            return
        progress = Progress(self.count, "images", "encoding: ")
        for number in range(len(starts)):
            progress.step(len(self._batch(number)[1]))
        if self.store is not None:
            moments, samples = zip(*(self.batches[number] for number in range(len(starts))), strict=True)
            self.store.write(torch.cat(moments), [sample for part in samples for sample in part])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index = key[1] if isinstance(key, tuple) else key
        if not 0 <= index < self.count:
            raise IndexError(index)
        number, row = divmod(index, self.batch_size)
        moments, samples = self._batch(number)
        return {**samples[row], "moments": moments[row]}

    def _read(self) -> bool:
        """Reads all samples from the store, and returns whether they were there."""
        stored = None if self.store is None else self.store.read()
        if stored is None:
            return False
        moments, samples = stored
        parts = [samples[start : start + self.batch_size] for start in range(0, self.count, self.batch_size)]
        self.batches = dict(enumerate(zip(moments.split(self.batch_size), parts, strict=True)))
        return True

    def _batch(self, number: int) -> tuple[Tensor, list[Sample]]:
        """Returns a batch, which is encoded when it is first read."""
        if number not in self.batches and (self.batches or not self._read()):
            start = number * self.batch_size
            samples = [self.dataset[index] for index in range(start, min(start + self.batch_size, self.count))]
            self.batches[number] = self.encode(torch.stack([sample.pop("image") for sample in samples])), samples
        return self.batches[number]
