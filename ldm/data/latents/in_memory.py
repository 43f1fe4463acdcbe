"""Encodes the images of a data set once and keeps their latents in memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.progress import Progress

Sample = dict[str, Any]
Encode = Callable[[Tensor], Tensor]
EncodeCaptions = Callable[[list[str]], Tensor]


class InMemory(Dataset[Sample]):
    """The first `count` samples of `dataset` (None: all), with "moments" in place of "image".

    The constructor encodes all images. `encode` maps uint8 images (b, 3, h, w) to moments (b, 2z, h / f, w / f);
    without it, samples keep their images. `encode_captions` maps captions to text states (b, n, d), which samples then
    hold as "states". If random crops, flips or captions differ from draw to draw, the first `draws` of them are kept
    and repeat in this order. Images may have several sizes, see `buckets`.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        encode: Encode | None = None,
        count: int | None = None,
        batch_size: int = 256,
        draws: int = 1,
        encode_captions: EncodeCaptions | None = None,
    ) -> None:
        if (count is not None and count < 1) or draws < 1:
            raise ValueError(f"data.count={count} and data.draws={draws}: expected at least 1 sample to encode")
        self.dataset, self.draws = dataset, draws
        self.size = len(dataset) if count is None else count  # type: ignore[arg-type]
        keys = [(draw, index) for draw in range(draws) for index in range(self.size)]
        progress = Progress(len(keys), "images", "encoding: ")
        self.samples: list[Sample] = []
        for start in range(0, len(keys), batch_size):
            samples = [dict(dataset[key]) for key in keys[start : start + batch_size]]
            self.samples += samples if encode is None else _with_moments(samples, encode)
            progress.step(len(samples))
        if encode_captions is not None:
            self._add_states(encode_captions, batch_size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        draw, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < self.size:
            raise IndexError(index)
        return dict(self.samples[draw % self.draws * self.size + index])

    @property
    def buckets(self) -> np.ndarray:
        return np.asarray(self.dataset.buckets)[: self.size]  # type: ignore[attr-defined]

    def _add_states(self, encode_captions: EncodeCaptions, batch_size: int) -> None:
        """Encodes each different caption once; samples of the same caption share its states."""
        captions = list(dict.fromkeys(sample["caption"] for sample in self.samples))
        states: dict[str, Tensor] = {}
        for start in range(0, len(captions), batch_size):
            batch = captions[start : start + batch_size]
            states |= zip(batch, encode_captions(batch), strict=True)
        for sample in self.samples:
            sample["states"] = states[sample["caption"]]


def _with_moments(samples: list[Sample], encode: Encode) -> list[Sample]:
    """Encodes the images of each size together."""
    shapes = [sample["image"].shape for sample in samples]
    for shape in dict.fromkeys(shapes):
        same = [sample for sample, other in zip(samples, shapes, strict=True) if other == shape]
        moments = encode(torch.stack([sample.pop("image") for sample in same]))
        for sample, row in zip(same, moments, strict=True):
            sample["moments"] = row
    return samples
