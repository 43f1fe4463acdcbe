"""What image-to-image and inpainting add to a walk from noise: pictures to start from, and masks."""

from collections.abc import Sequence
from math import ceil

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d

from ldm.diffusion.denoiser import Denoise
from ldm.image import pixels, resize_and_crop
from ldm.pipeline.inputs import ImageRequest

Size = tuple[int, int]  # height, width
STRENGTH = 0.8  # unless another is given
MOST_STEPS = 1000


def steps_of(steps: int, strength: float | None, fixed: bool = False) -> tuple[int, int]:
    """The steps of a whole walk, and how many at its end a strength takes: int(strength · steps), as in diffusers.

    With `fixed` they are `steps`, at the end of a finer whole. Raises ValueError for a strength outside (0, 1], or of
    less than one step.
    """
    if strength is None:
        return steps, steps
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise ValueError(f"strength is {strength!r}, but must be above 0 and at most 1")
    if fixed:
        whole = ceil(steps / strength)
        if whole > MOST_STEPS:
            raise ValueError(
                f"{steps} fixed steps at strength={strength} are the end of {whole}, but {MOST_STEPS} is the most: "
                "take fewer steps or more strength"
            )
        return whole, steps
    walked = int(strength * steps)
    if walked < 1:
        raise ValueError(
            f"strength={strength} of {steps} steps is less than one step: take one above 1/{steps}, or more steps"
        )
    return steps, walked


def source_tensors(
    items: Sequence[ImageRequest], size: Size, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The images of all items, uint8 (b, 3, h, w), and their masks, see `fit_mask`; None where there are none."""
    images = [fit(item.image, size) for item in items if item.image is not None]
    masks = [fit_mask(item.mask, item.image, size) for item in items if item.image and item.mask]
    originals = torch.stack(images).to(device) if images else None
    return originals, torch.stack(masks).to(device) if masks else None


def fit(image: Image.Image, size: Size) -> Tensor:
    """uint8 (3, h, w): the picture scaled until it covers `size`, and cropped to it."""
    return pixels(resize_and_crop(image.convert("RGB"), size))


def fit_mask(mask: Image.Image, image: Image.Image, size: Size) -> Tensor:
    """The share (1, h, w) of each pixel that is repainted, 1 where white; the mask goes the way of its picture."""
    grey = mask.convert("L")
    grey = grey if grey.size == image.size else grey.resize(image.size, Image.Resampling.BILINEAR)
    return pixels(resize_and_crop(grey, size))[:1].float() / 255


def keeping(denoise: Denoise, x0: Tensor, repaint: Tensor) -> Denoise:
    """`denoise` with the estimate replaced by the known x0 (b, c, h, w) where `repaint` (b, 1, h, w) is False.

    This is latent blending for every solver at once: where x0 is known exactly, each solver's update carries the
    kept part from alpha·x0 + sigma·eps to the same at the next point (with the same eps if the solver draws none),
    which putting it back between steps would do too, but which would leave multistep solvers a history of estimates
    that the state no longer follows.
    """
    return lambda x, t: torch.where(repaint, denoise(x, t), x0)


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """Masks (b, 1, h, w) → bool (b, 1, h/factor, w/factor): latents with any pixel that is repainted by half."""
    return max_pool2d(mask, factor) >= 0.5


def paste(drawn: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """The original where the mask is 0, what was drawn where it is 1; uint8 (b, 3, h, w)."""
    return torch.lerp(original.float(), drawn.float(), mask).round().to(torch.uint8)
