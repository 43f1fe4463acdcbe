"""Whether the images that a run reads are of the size that it draws."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from ldm.data.latents.cache import Decoded

Size = tuple[int, int]  # height, width


def check_sizes(datasets: Mapping[str, Dataset[Any]], size: Size, factor: int) -> None:
    """Raises ValueError where the first sample of one of `datasets`, by the settings that name them, is not of `size`.

    A latent stands for `factor` x `factor` pixels.
    """
    for name, dataset in datasets.items():
        height, width = size_of(dataset, factor) if len(dataset) else size  # type: ignore[arg-type]
        if (height, width) != size:
            raise ValueError(
                f"the images of {name} are {height}x{width}, but training.size is {[*size]}, the size that is drawn "
                f"and evaluated: set training.size=[{height},{width}], or give images of that size"
            )


def size_of(dataset: Dataset[Any], factor: int) -> Size:
    """The height and width in pixels of the first sample, which holds an "image" (3, h, w) or "moments" (2z, h, w)."""
    sample: dict[str, Any] = dict((dataset.dataset if isinstance(dataset, Decoded) else dataset)[0])  # decodes nothing
    if "image" in sample:
        height, width = sample["image"].shape[1:]
        return height, width
    height, width = sample["moments"].shape[1:]
    return height * factor, width * factor
