"""Keeping x0 within the range of pictures: a function from a denoiser to a denoiser.

For diffusion in pixel space (Saharia et al. 2022, section 2.3): latents have no such range.
"""

from torch import Tensor

from ldm.diffusion.denoiser import Denoise


def static(denoise: Denoise, limit: float = 1.0) -> Denoise:
    """x0 cut off at ±limit."""
    if not limit > 0:
        raise ValueError(f"the limit of static thresholding is {limit}, but must be positive")
    return lambda x, t: denoise(x, t).clamp(-limit, limit)


def dynamic(denoise: Denoise, share: float = 0.995, limit: float = 1.0) -> Denoise:
    """x0 cut off, in each picture, below which this share of its absolute values lies, and divided by that if it
    exceeds the limit."""
    if not (0 < share <= 1 and limit > 0):
        raise ValueError(f"dynamic thresholding needs a share from 0 to 1 and a limit above 0, not {share} and {limit}")

    def thresholded(x: Tensor, t: float) -> Tensor:
        x0 = denoise(x, t)
        bound = x0.flatten(1).abs().float().quantile(share, dim=1).to(x0.dtype).clamp(min=limit)
        bound = bound.view(-1, *[1] * (x0.ndim - 1))  # (b, 1, …)
        return x0.clamp(-bound, bound) * (limit / bound)

    return thresholded
