"""Prepares source images and masks for image-to-image and inpainting, and counts the steps of a strength."""

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
STRENGTH = 0.8  # the default
MAX_STEPS = 1000


def step_counts(steps: int, strength: float | None, fixed: bool = False) -> tuple[int, int]:
    """Returns the number of steps from pure noise, and how many of the last ones are run.

    A strength runs int(strength · steps) of them, as in diffusers; with `fixed`, `steps` steps at the end of a finer
    grid. Raises ValueError for a strength outside (0, 1], or one of less than one step.
    """
    if strength is None:
        return steps, steps
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise ValueError(f"strength is {strength!r}, but must be above 0 and at most 1")
    if fixed:
        total = ceil(steps / strength)
        if total > MAX_STEPS:
            raise ValueError(
                f"{steps} fixed steps at strength={strength} are the last of {total} steps, but at most {MAX_STEPS} "
                "are allowed: use fewer steps or a higher strength"
            )
        return total, steps
    run = int(strength * steps)
    if run < 1:
        raise ValueError(
            f"strength={strength} of {steps} steps is less than one step: use a strength above 1/{steps}, or more steps"
        )
    return steps, run


def source_tensors(
    requests: Sequence[ImageRequest], size: Size, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the images, uint8 (b, 3, h, w), and their masks, see `fit_mask`; None where there are none."""
    images = [fit_image(request.image, size) for request in requests if request.image is not None]
    masks = [fit_mask(request.mask, request.image, size) for request in requests if request.image and request.mask]
    sources = torch.stack(images).to(device) if images else None
    return sources, torch.stack(masks).to(device) if masks else None


def fit_image(image: Image.Image, size: Size) -> Tensor:
    """Returns the image scaled to cover `size` and cropped to it, uint8 (3, h, w)."""
    return pixels(resize_and_crop(image, size))


def fit_mask(mask: Image.Image, image: Image.Image, size: Size) -> Tensor:
    """Returns the share (1, h, w) of each pixel that is repainted, 1 where the mask is white.

    The mask is scaled to its image, then scaled and cropped as the image is.
    """
    gray = mask.convert("L")
    gray = gray if gray.size == image.size else gray.resize(image.size, Image.Resampling.BILINEAR)
    return pixels(resize_and_crop(gray, size))[:1].float() / 255


def keep_unmasked(denoise: Denoise, x0: Tensor, repaint: Tensor) -> Denoise:
    """Replaces the estimate of `denoise` by the known x0 (b, c, h, w) where `repaint` (b, 1, h, w) is False.

    This is latent blending for every solver: where x0 is known exactly, each solver's update maps the kept part from
    alpha·x0 + sigma·eps to the same form at the next point, with the same eps if the solver adds no noise. Overwriting
    the state between steps would give the same kept part, but multistep solvers would then hold a history of estimates
    that does not match the state.
    """
    return lambda x, t: torch.where(repaint, denoise(x, t), x0)


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """Reduces masks (b, 1, h, w) to bool (b, 1, h/factor, w/factor): True where any pixel is repainted by half."""
    return max_pool2d(mask, factor) >= 0.5


def paste(generated: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Blends uint8 images (b, 3, h, w): the original where the mask is 0, the generated image where it is 1."""
    return torch.lerp(original.float(), generated.float(), mask).round().to(torch.uint8)
