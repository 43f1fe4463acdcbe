"""Reads loss masks, which weight each pixel, from a file beside the image or from its alpha channel."""

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.data.sources.image import Framing
from ldm.image import load_alpha, load_image, upright_size

SUFFIX = ".mask.png"


def is_mask(key: str) -> bool:
    return key.lower().endswith(SUFFIX)


def mask_path(image: Path) -> Path:
    """Returns the path NAME.mask.png for the image NAME.EXTENSION."""
    return image.with_name(image.stem + SUFFIX)


def framed_mask(image: Path, shape: torch.Size, framing: Framing, caption: str, id: int, draw: int) -> Tensor:
    """Returns the mask, uint8 (1, h, w): NAME.mask.png (255 trains, 0 does not), else the image's alpha, else all 255.

    Raises ValueError if the mask's size differs from the image's or the mask is completely black.
    """
    full = _mask(image)
    if full is None:
        return torch.full((1, *shape[1:]), 255, dtype=torch.uint8)
    mask = framing.frame(full.convert("RGB"), (shape[1], shape[2]), caption, id, draw)[:1]
    if not mask.any():
        raise ValueError(f"the mask of {image} leaves nothing of the cropped image to train on: paint some of it white")
    return mask


def check_any(images: Iterable[Path], root: Path) -> None:
    """Raises ValueError if no image has a mask, because `data.masks` would then have no effect."""
    if not any(mask_path(image).is_file() or load_alpha(image) is not None for image in images):
        raise ValueError(
            f"data.masks=true, but no image in {root} has an alpha channel or a NAME{SUFFIX} beside it: add masks, or "
            "remove the setting"
        )


def _mask(image: Path) -> Image.Image | None:
    path = mask_path(image)
    if not path.is_file():
        return load_alpha(image)
    mask, (width, height) = load_image(path), upright_size(image)
    if mask.size != (width, height):
        raise ValueError(
            f"{path} is {mask.width}x{mask.height} and its image {width}x{height}: give the mask the size of the image"
        )
    return mask
