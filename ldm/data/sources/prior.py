"""Prior preservation: images of the class that the base model sampled, mixed with those of the subject.

DreamBooth (Ruiz et al. 2023), equation 2: the loss is that of the subject's images plus a weight times that of the
class images.
"""

from typing import Any

import torch
from torch.utils.data import Dataset

Sample = dict[str, Any]


class WithPrior(Dataset[Sample]):
    """Alternates between `images` and `class_images`: each pair of consecutive samples has one of either.

    With data.run=2 and an even batch size, half of every batch are class images. A sample's "weight" is 2 or 2 ·
    `prior_weight`, so that the mean over a batch of such halves is the sum of the two mean losses. The shorter set
    repeats, each time as another draw. If images have a "mask", class images count in full.
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
