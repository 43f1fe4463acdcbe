"""Checks that the images a run reads have the size that it generates."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from ldm.data.latents.cache import Decoded

Size = tuple[int, int]  # height, width


def check_sizes(datasets: Mapping[str, Dataset[Any]], size: Size, factor: int) -> None:
    """Raises ValueError if the first sample of a data set is not of `size`; `datasets` maps settings to data sets.

    One latent pixel represents `factor` x `factor` pixels.
    """
    for name, dataset in datasets.items():
        height, width = size_of(dataset, factor) if len(dataset) else size  # type: ignore[arg-type]
        if (height, width) != size:
            raise ValueError(
                f"the images of {name} are {height}x{width}, but training.size is {[*size]}, the size that is sampled "
                f"and evaluated: set training.size=[{height},{width}], or use images of size {size[0]}x{size[1]}"
            )


def size_of(dataset: Dataset[Any], factor: int) -> Size:
    """Returns the height and width in pixels of the first sample: its "image" (3, h, w) or "moments" (2z, h, w)."""
    latents = dataset.dataset if isinstance(dataset, Decoded) else dataset  # avoids decoding a sample
    sample: dict[str, Any] = dict(latents[0])
    if "image" in sample:
        height, width = sample["image"].shape[1:]
        return height, width
    height, width = sample["moments"].shape[1:]
    return height * factor, width * factor
