"""Mixes a subject's images with class images sampled from the base model, for prior preservation.

The loss is that of the subject's images plus a weight times that of the class images (DreamBooth, Ruiz et al. 2023,
equation 2).
"""

from typing import Any

import torch
from torch.utils.data import Dataset

Sample = dict[str, Any]


class WithPrior(Dataset[Sample]):
    """Alternates between `images` and `class_images`: each pair of consecutive samples has one of each.

    With data.run=2 and an even batch size, half of every batch are class images. The "weight" is 2 for a subject's
    image and 2 · `prior_weight` for a class image, so that the mean over such a batch is the weighted sum of the two
    mean losses. The shorter set repeats, each time as another draw. If images have a "mask", that of class images is
    255 everywhere.
    """

    def __init__(self, images: Dataset[Sample], class_images: Dataset[Sample], prior_weight: float = 1.0) -> None:
        if prior_weight <= 0:
            raise ValueError(
                f"data.prior_weight={prior_weight}: expected a positive number; to train without class images, choose "
                "data=small"
            )
        self.sets, self.weights = (images, class_images), (2.0, 2.0 * prior_weight)
        self.sizes = len(images), len(class_images)  # type: ignore[arg-type]
        self.dataset = images

    def __len__(self) -> int:
        return 2 * max(self.sizes)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        draw, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(index)
        pair, member = divmod(index, 2)
        turn, inner = divmod(draw * max(self.sizes) + pair, self.sizes[member])
        sample = dict(self.sets[member][turn, inner])
        if member == 1 and "mask" in (example := self.sets[0][0, 0]):
            sample["mask"] = torch.full_like(example["mask"], 255)
        return {**sample, "id": index, "weight": self.weights[member]}
