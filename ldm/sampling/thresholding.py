"""Thresholding: wraps a denoiser so that its estimates of x0 stay within the range of the data.

It was designed for diffusion in pixel space (Saharia et al. 2022, section 2.3). Latents have no fixed range, so their
limit is a number of standard deviations, such as 4.
"""

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.options import choose


def none(denoise: Denoise) -> Denoise:
    return denoise


def static(denoise: Denoise, limit: float = 1.0) -> Denoise:
    """Clamps x0 to ±limit."""
    _check("limit", limit, inf)
    return lambda x, t: denoise(x, t).clamp(-limit, limit)


def dynamic(denoise: Denoise, share: float = 0.995, limit: float = 1.0) -> Denoise:
    """Clamps x0 of each image to the quantile `share` of its absolute values, and scales that bound down to `limit`.

    An image whose quantile is below the limit is clamped to the limit.
    """
    _check("share", share, 1.0)
    _check("limit", limit, inf)

    def thresholded(x: Tensor, t: float) -> Tensor:
        x0 = denoise(x, t)
        bound = x0.flatten(1).abs().float().quantile(share, dim=1).to(x0.dtype).clamp(min=limit)
        bound = bound.view(-1, *[1] * (x0.ndim - 1))  # (b, 1, …)
        return x0.clamp(-bound, bound) * (limit / bound)

    return thresholded


THRESHOLDINGS: dict[str, Callable[[Denoise], Denoise]] = {"none": none, "static": static, "dynamic": dynamic}


def get_thresholding(name: str, options: Mapping[str, Any] | None = None) -> Callable[[Denoise], Denoise]:
    """Returns a thresholding with its options bound. Raises ValueError for an unknown name or invalid options."""
    chosen = choose("thresholding", THRESHOLDINGS, name, options or {})
    chosen(lambda x, t: x)
    return chosen


def _check(name: str, value: float, maximum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= maximum or value == inf:
        bounds = "above 0" if maximum == inf else f"above 0 and at most {maximum:g}"
        raise ValueError(f"the {name} of thresholding is {value!r}, but must be a number {bounds}")
