"""The images of a pipeline call."""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from ldm.image import to_pil


@dataclass(frozen=True)
class Result:
    """Images, uint8 (n, 3, h, w) on the CPU, and the settings that reproduce each, given the same image and mask.

    `batch_size` is as requested, or smaller if a batch was out of memory.
    """

    images: Tensor
    settings: list[dict[str, Any]]
    batch_size: int

    @property
    def pil(self) -> list[Image.Image]:
        """The images as PIL images."""
        return to_pil(self.images)

    def __repr__(self) -> str:
        count, _, height, width = self.images.shape
        return f"Result({count} image{'s' if count > 1 else ''} of {height}x{width})"
