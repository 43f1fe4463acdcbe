"""Guidance: combines two denoisers into one that moves towards the first and away from the second."""

from collections.abc import Callable
from math import inf, isfinite, log

import torch
from torch import Tensor

from ldm.conditioning import Conditioning, cat
from ldm.diffusion.denoiser import Conditional, Denoise
from ldm.diffusion.prediction import per_sample
from ldm.diffusion.schedule import Schedule

Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (x, t) → x0 to move towards, x0 to move away from
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
    """Classifier-free guidance away from the negative conditioning (Ho & Salimans 2022); see `guided`.

    If `batched`, the denoiser is called once with 2b conditionings; otherwise twice with b, which takes less memory and
    allows texts of two lengths.
    """
    if len(conditioning) != len(negative):
        raise ValueError(
            f"there are {len(conditioning)} conditionings but {len(negative)} negative ones: give one for each"
        )
    if isinstance(scale, Tensor) and scale.shape not in ((), (len(conditioning),)):
        raise ValueError(f"guidance scales of shape {tuple(scale.shape)} do not fit {len(conditioning)} conditionings")
    both = cat([conditioning, negative]) if batched else conditioning

    def positive(x: Tensor, t: float) -> Tensor:
        return denoiser(x, t, conditioning)

    def together(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        towards, away = denoiser(x, t, both).split(len(x))
        return towards, away

    def in_sequence(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return positive(x, t), denoiser(x, t, negative)

    return guided(positive, together if batched else in_sequence, scale, interval, rescale)


def autoguidance(
    denoise: Denoise, weak: Denoise, scale: float | Tensor, interval: Interval | None = None, rescale: float = 0.0
) -> Denoise:
    """Guidance away from a smaller or less trained model of the same data and prompts (Karras et al. 2024)."""
    return guided(denoise, lambda x, t: (denoise(x, t), weak(x, t)), scale, interval, rescale)


def guided(
    plain: Denoise, pair: Pair, scale: float | Tensor, interval: Interval | None = None, rescale: float = 0.0
) -> Denoise:
    """Returns a denoiser with x0 = away + scale·(towards - away) of the `pair`; `plain` is the one to move towards.

    `scale` is one number or (b,); 1 is no guidance. Outside the `interval` of times only `plain` is called
    (Kynkäänniemi et al. 2024). `rescale` is phi of `rescaled`. Raises ValueError for a scale that is not finite.
    """
    finite = bool(scale.isfinite().all()) if isinstance(scale, Tensor) else isfinite(scale)
    if not finite:
        raise ValueError(f"the guidance scale is {scale}, but must be finite")
    if not 0 <= rescale <= 1:
        raise ValueError(f"the guidance rescale is {rescale}, but must be between 0 and 1")

    def denoise(x: Tensor, t: float) -> Tensor:
        outside = interval is not None and not interval[0] <= t <= interval[1]
        if outside or (not isinstance(scale, Tensor) and scale == 1):
            return plain(x, t)
        towards, away = pair(x, t)
        factor = per_sample(scale.to(x.device).expand(len(x)), x) if isinstance(scale, Tensor) else scale
        x0 = away + factor * (towards - away)
        return rescaled(x0, towards, rescale) if rescale else x0

    return denoise


def rescaled(x0: Tensor, reference: Tensor, phi: float) -> Tensor:
    """Moves the standard deviation of x0 (b, …) by phi of the way to that of `reference` (Lin et al. 2024, eq. 16).

    The paper rescales the network's output. Rescaling x0 instead preserves the contrast of the image for every
    prediction type, and is the same as rescaling v where alpha is 0.
    """
    std = [part.flatten(1).std(1) for part in (reference, x0)]  # (b,)
    ratio = std[0] / std[1].clamp(min=torch.finfo(x0.dtype).tiny)
    return x0 * per_sample(phi * ratio + (1 - phi), x0)


def interval_to_times(schedule: Schedule, interval: tuple[float, float | None]) -> Interval:
    """Returns the times between which sigma/alpha is in `interval`, whose high end None is infinite.

    sigma/alpha is the sigma of Kynkäänniemi et al. for data of standard deviation 1. Unlike a time or a fraction of the
    steps, it means the same on every schedule, with every sampler and number of steps.
    """
    low, high = interval[0], inf if interval[1] is None else interval[1]
    if not 0 <= low < high:
        raise ValueError(f"a guidance interval is a low and a high sigma/alpha, not {low} and {high}")
    ends = [inf if ratio == 0 else -2 * log(ratio) for ratio in (low, high)]
    first, last = schedule.time(torch.tensor(ends, dtype=torch.float64)).tolist()
    return first, last
