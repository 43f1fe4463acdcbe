"""Decodes, crops and flips the images of folders and shards."""

import re
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import numpy as np
from PIL import Image
from torch import Tensor

from ldm.data.sources.buckets import Size, nearest
from ldm.image import image_format, load_image, pixels, resize_and_crop, upright_size

# Of all formats that Pillow decodes itself. If an image is in several files, the first of these extensions counts.
EXTENSIONS = (
    "png", "jpg", "jpeg", "webp", "apng", "avif", "avifs", "blp", "bmp", "bw", "cur", "dcx", "dds", "dib", "fit",
    "fits", "flc", "fli", "ftc", "ftu", "gbr", "gif", "icb", "icns", "ico", "iim", "im", "j2c", "j2k", "jfif", "jp2",
    "jpc", "jpe", "jpf", "jpx", "mpo", "msp", "pbm", "pcd", "pcx", "pfm", "pgm", "pnm", "ppm", "psd", "pxr", "qoi",
    "ras", "rgb", "rgba", "sgi", "tga", "tif", "tiff", "vda", "vst", "xbm", "xpm",
)  # fmt: skip
_SIDES = re.compile(r"(?<![a-z])(left|right)(wards?)?(?![a-z])", re.IGNORECASE)


class Sample(TypedDict):
    image: Tensor  # uint8 (3, h, w)
    mask: NotRequired[Tensor]  # uint8 (1, h, w), the weight of each pixel in the loss
    caption: str
    key: str
    id: int


@dataclass(frozen=True)
class Framing:
    """Maps the bytes of an image to a uint8 square of `size`, or to the bucket nearest in aspect ratio.

    Crop and flip are a function of (seed, id, draw). A random `crop` moves the window and keeps the scale. `flip` is
    the probability of a mirror image; images whose caption says left or right are never flipped. Raises ValueError for
    invalid settings.
    """

    size: int
    background: tuple[int, int, int]
    crop: Literal["center", "random"]
    flip: float
    seed: int
    buckets: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size={self.size}: expected a positive number of pixels")
        if self.crop not in ("center", "random"):
            raise ValueError(f'crop={self.crop!r}: expected "center" or "random"')
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip}: expected a probability from 0 to 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: expected a non-negative integer")

    def __call__(self, data: bytes, caption: str, name: str, id: int, draw: int) -> Tensor:
        """Returns the image as uint8 (3, h, w). Raises ValueError with its `name` if it cannot be decoded."""
        longest = max(side for size in self.buckets or [(self.size,)] for side in size)
        size = self.size_of(*upright_size(data, name)) if self.buckets else self.size
        return self.frame(load_image(data, self.background, name=name, side=longest), size, caption, id, draw)

    def size_of(self, width: int, height: int) -> int | Size:
        """Returns the size to which an image of this width and height is cropped."""
        return nearest(width, height, self.buckets) if self.buckets else self.size

    def frame(self, image: Image.Image, size: int | Size, caption: str, id: int, draw: int) -> Tensor:
        """Crops a decoded RGB image to `size`, uint8 (3, h, w); its mask is cropped and flipped likewise."""
        keyed = np.random.Generator(np.random.Philox(key=[self.seed, id], counter=[0, 0, 0, draw]))
        u, v, mirror = (float(x) for x in keyed.random(3))
        image = resize_and_crop(image, size, (u, v) if self.crop == "random" else (0.5, 0.5))
        x = pixels(image)
        return x.flip(-1) if mirror < self.flip and not _SIDES.search(caption) else x


def image_extension(data: bytes) -> str | None:
    """Returns the usual extension of an image file of this content, None if it is not an image."""
    name = image_format(data)
    usual = (extension for extension in EXTENSIONS if Image.registered_extensions().get(f".{extension}") == name)
    return next(usual, None) if name else None


def draw_and_index(index: int | tuple[int, int], length: int) -> tuple[int, int]:
    """Splits an index of a data set into draw and position, with draw 0 for an integer.

    Samplers pass the epoch to workers as the draw. Raises IndexError if the position is out of range.
    """
    draw, position = index if isinstance(index, tuple) else (0, index)
    if not 0 <= position < length:
        raise IndexError(f"index {position} is out of range for {length} samples")
    return draw, position
