"""Guidance: a function from denoisers to a denoiser."""

from collections.abc import Callable
from math import inf, isfinite, log

import torch
from torch import Tensor

from ldm.conditioning import Conditioning, cat
from ldm.diffusion.denoiser import Conditional, Denoise
from ldm.diffusion.prediction import per_sample
from ldm.diffusion.schedule import Schedule

Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (x, t) → x0 to go towards, x0 to go away from
Interval = tuple[float, float]


def classifier_free(
    denoiser: Conditional,
    conditioning: Conditioning,
    negative: Conditioning,
    scale: float | Tensor,
    interval: Interval | None = None,
    batched: bool = True,
    rescale: float = 0.0,
) -> Denoise:
    """Away from the estimate under the negative conditioning (Ho & Salimans 2022); the rest as in `guided`.

    `batched` makes one call of 2b samples; two calls of b take less memory, and texts of two lengths.
    """
    if len(conditioning) != len(negative):
        raise ValueError(f"there are {len(conditioning)} conditionings but {len(negative)} negative ones")
    if isinstance(scale, Tensor) and scale.shape not in ((), (len(conditioning),)):
        raise ValueError(f"guidance scales of shape {tuple(scale.shape)} do not fit {len(conditioning)} conditionings")
    both = cat([conditioning, negative]) if batched else conditioning

    def positive(x: Tensor, t: float) -> Tensor:
        return denoiser(x, t, conditioning)

    def together(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        towards, away = denoiser(x, t, both).split(len(x))
        return towards, away

    def in_turn(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return positive(x, t), denoiser(x, t, negative)

    return guided(positive, together if batched else in_turn, scale, interval, rescale)


def autoguidance(
    denoise: Denoise, weak: Denoise, scale: float | Tensor, interval: Interval | None = None, rescale: float = 0.0
) -> Denoise:
    """Away from a worse model of the same data and prompts, smaller or less trained (Karras et al. 2024)."""
    return guided(denoise, lambda x, t: (denoise(x, t), weak(x, t)), scale, interval, rescale)


def guided(
    plain: Denoise, pair: Pair, scale: float | Tensor, interval: Interval | None = None, rescale: float = 0.0
) -> Denoise:
    """away + scale·(towards - away), on x0; `plain` alone outside the interval of times (Kynkäänniemi et al. 2024).

    scale is one number or (b,), and 1 is no guidance. Raises ValueError for one that is not finite.
    """
    finite = bool(scale.isfinite().all()) if isinstance(scale, Tensor) else isfinite(scale)
    if not finite:
        raise ValueError(f"the guidance scale is {scale}, but must be finite")
    if not 0 <= rescale <= 1:
        raise ValueError(f"the guidance rescale is {rescale}, but must lie between 0 and 1")

    def denoise(x: Tensor, t: float) -> Tensor:
        outside = interval is not None and not interval[0] <= t <= interval[1]
        if outside or (not isinstance(scale, Tensor) and scale == 1):
            return plain(x, t)
        towards, away = pair(x, t)
        factor = per_sample(scale.to(x.device).expand(len(x)), x) if isinstance(scale, Tensor) else scale
        x0 = away + factor * (towards - away)
        return rescaled(x0, towards, rescale) if rescale else x0

    return denoise


def rescaled(x0: Tensor, like: Tensor, share: float) -> Tensor:
    """x0 (b, …) with `share` of the way gone to the deviation of `like` (Lin et al. 2024, equations 15 and 16).

    The paper does so to the network's output; on x0 it is the picture's contrast that is kept, whatever the network
    predicts, and where alpha is 0 the two agree for v.
    """
    std = [part.flatten(1).std(1) for part in (like, x0)]
    ratio = std[0] / std[1].clamp(min=torch.finfo(x0.dtype).tiny)
    return x0 * per_sample(share * ratio + (1 - share), x0)


def interval_to_times(schedule: Schedule, interval: Interval) -> Interval:
    """The times at which sigma/alpha lies in `interval`, the unit of Kynkäänniemi et al. for data of deviation 1.

    Unlike a time or a share of the steps, it means the same on every schedule, sampler and number of steps.
    """
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"a guidance interval is a low and a high sigma/alpha, not {low} and {high}")
    ends = [inf if ratio == 0 else -2 * log(ratio) for ratio in (low, high)]
    first, last = schedule.time(torch.tensor(ends, dtype=torch.float64)).tolist()
    return first, last
