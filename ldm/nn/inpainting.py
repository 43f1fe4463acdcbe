"""The hint of inpainting networks, which read the mask and the latents of the masked image beside noisy latents."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

INPAINTING = "inpainting"  # its name in `Conditioning.hints`


def inpainting_hint(images: Tensor, masks: Tensor, factor: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the hint (b, 1 + z, H/f, W/f) of images (b, 3, H, W) in [-1, 1] and masks (b, 1, H, W), 1 to repaint.

    The mask is subsampled at the top left pixel of each square of `factor` pixels, and masked pixels of the image are
    grey (0), as in the training of Stable Diffusion's inpainting weights.
    """
    small = interpolate((masks >= 0.5).float(), scale_factor=1 / factor)
    return torch.cat((small, encode(images * (masks < 0.5))), dim=1)
