"""Encodes the images of a data set once and keeps their latents in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.progress import Progress

Sample = dict[str, Any]


class InMemory(Dataset[Sample]):
    """The first `count` samples of `dataset`, with "moments" in place of "image".

    The constructor encodes all images. `encode` maps uint8 images (b, 3, h, w) to moments (b, 2z, h / f, w / f).
    """

    def __init__(
        self, dataset: Dataset[Sample], encode: Callable[[Tensor], Tensor], count: int, batch_size: int = 256
    ) -> None:
        if count < 1:
            raise ValueError(f"data.count={count}: expected at least 1 sample to encode")
        self.samples: list[Sample] = []
        moments, progress = [], Progress(count, "images", "encoding: ")
        for start in range(0, count, batch_size):
            samples = [dataset[index] for index in range(start, min(start + batch_size, count))]
            moments.append(encode(torch.stack([sample.pop("image") for sample in samples])))
            self.samples.extend(samples)
            progress.step(len(samples))
        self.moments = torch.cat(moments)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index = key[1] if isinstance(key, tuple) else key
        return {**self.samples[index], "moments": self.moments[index]}
