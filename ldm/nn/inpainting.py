"""What an inpainting network sees besides the noisy latents: the mask, and the latents of the masked image."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

INPAINTING = "inpainting"  # the name of the hint


def inpainting_hint(images: Tensor, masks: Tensor, factor: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Images (b, 3, H, W) in [-1, 1] and masks (b, 1, H, W), 1 where to repaint → the hint (b, 1 + z, H/f, W/f).

    The mask is taken at the first pixel of each square of `factor` pixels, and the image is grey where it is masked,
    as Stable Diffusion's inpainting weights were trained.
    """
    small = interpolate((masks >= 0.5).float(), scale_factor=1 / factor)
    return torch.cat((small, encode(images * (masks < 0.5))), dim=1)
