"""Encodes the images of a data set once and keeps their latents in memory, and on disk for the next run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.latents.store import Identified, LatentStore, store_folder
from ldm.progress import Progress

Sample = dict[str, Any]
Encode = Callable[[Tensor], Tensor]
EncodeCaptions = Callable[[list[str]], Tensor]


class InMemory(Dataset[Sample]):
    """The first `count` samples of `dataset` (None: all), with "moments" in place of "image".

    `encode` maps uint8 images (b, 3, h, w) to moments (b, 2z, h / f, w / f); without it, samples keep their images.
    `encode_captions` maps captions to text states (b, n, d), which are stored in samples as "states". If random crops,
    flips or captions differ between draws, the first `draws` are kept and repeat in this order. Images may have several
    sizes, see `buckets`.

    A data set with an identity is encoded when `load` is called or a sample is read, so that invalid runs are refused
    before the encoding; others are encoded immediately. If `dataset` and `encode` have an identity, the encoded data
    set is kept for later runs in the folder `store`; "auto" is `ldm.files.cache_home`, None keeps nothing.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        encode: Encode | None = None,
        count: int | None = None,
        batch_size: int = 256,
        draws: int = 1,
        encode_captions: EncodeCaptions | None = None,
        store: str | None = None,
    ) -> None:
        if (count is not None and count < 1) or draws < 1:
            raise ValueError(f"data.count={count} and data.draws={draws}: expected at least 1 sample to encode")
        self.dataset, self.encode, self.encode_captions = dataset, encode, encode_captions
        self.count = len(dataset) if count is None else count  # type: ignore[arg-type]
        self.draws, self.batch_size = draws, batch_size
        self.batches: dict[int, list[Sample]] = {}
        self.states: dict[str, Tensor] = {}
        self.store: LatentStore | None = None
        folder, plain = store_folder(store), draws == 1 and encode_captions is None
        if folder is not None and plain and isinstance(dataset, Identified) and isinstance(encode, Identified):
            self.store = LatentStore(folder, dataset, encode, self.count, batch_size)
        if not isinstance(dataset, Identified):
            self.load()

    def load(self) -> None:
        """Reads all samples from the store, or encodes those that are not encoded yet and stores them."""
        batches = range(-(-self.count * self.draws // self.batch_size))
        if len(self.batches) == len(batches) or self._read():
            return
        progress = Progress(self.count * self.draws, "images", "encoding: ")
        for number in batches:
            progress.step(len(self._batch(number)))
        if self.store is not None:
            samples = [dict(sample) for number in batches for sample in self.batches[number]]
            self.store.write(torch.stack([sample.pop("moments") for sample in samples]), samples)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        draw, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < self.count:
            raise IndexError(index)
        number, row = divmod(draw % self.draws * self.count + index, self.batch_size)
        return dict(self._batch(number)[row])

    @property
    def buckets(self) -> np.ndarray:
        return np.asarray(self.dataset.buckets)[: self.count]  # type: ignore[attr-defined]

    def _read(self) -> bool:
        """Reads all samples from the store, and returns whether they were stored."""
        stored = None if self.store is None else self.store.read()
        if stored is None:
            return False
        samples = [{**sample, "moments": moments} for moments, sample in zip(*stored, strict=True)]
        starts = range(0, self.count, self.batch_size)
        self.batches = {number: samples[start : start + self.batch_size] for number, start in enumerate(starts)}
        return True

    def _batch(self, number: int) -> list[Sample]:
        """Returns a batch, which is encoded when it is first read."""
        if number not in self.batches and (self.batches or not self._read()):
            first = number * self.batch_size
            places = range(first, min(first + self.batch_size, self.count * self.draws))
            samples = [dict(self.dataset[self._key(place)]) for place in places]
            if self.encode is not None:
                _add_moments(samples, self.encode)
            if self.encode_captions is not None:
                self._add_states(samples, self.encode_captions)
            self.batches[number] = samples
        return self.batches[number]

    def _key(self, place: int) -> Any:
        return place if self.draws == 1 else divmod(place, self.count)

    def _add_states(self, samples: list[Sample], encode_captions: EncodeCaptions) -> None:
        """Encodes each distinct caption once; samples with the same caption share its states."""
        new = [caption for caption in dict.fromkeys(s["caption"] for s in samples) if caption not in self.states]
        if new:
            self.states |= zip(new, encode_captions(new), strict=True)
        for sample in samples:
            sample["states"] = self.states[sample["caption"]]


def _add_moments(samples: list[Sample], encode: Encode) -> None:
    """Encodes the images of each size together."""
    shapes = [sample["image"].shape for sample in samples]
    for shape in dict.fromkeys(shapes):
        same = [sample for sample, other in zip(samples, shapes, strict=True) if other == shape]
        moments = encode(torch.stack([sample.pop("image") for sample in same]))
        for sample, row in zip(same, moments, strict=True):
            sample["moments"] = row
