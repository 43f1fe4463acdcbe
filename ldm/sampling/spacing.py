"""Spacings: the decreasing times, float64 (steps,), at which a sampler calls the denoiser."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.sampling.options import check_range, choose

Spacing = Callable[[Schedule, int], Tensor]
RATIOS = 0.002, 80.0  # bounds of sigma / alpha if those of the schedule are 0 or infinite (Karras et al. 2022, table 1)


def trailing(schedule: Schedule, steps: int) -> Tensor:
    """Equal strides down from the last time (Lin et al. 2024, table 2, like leading and linspace)."""
    _check(schedule, steps)
    index = torch.arange(steps, dtype=torch.float64)
    if not schedule.discrete:
        return schedule.t_max - index * ((schedule.t_max - schedule.t_min) / steps)
    size = schedule.t_max + 1
    return (size - index * (size / steps)).round() - 1


def leading(schedule: Schedule, steps: int, offset: int = 1, extra: bool = False) -> Tensor:
    """Integer strides up from index `offset` (SD's steps_offset), which leave out the last time.

    A continuous schedule is divided into 1000 indices. `extra` uses the strides of one more step and leaves out the
    last of its times, as diffusers' DPM-Solver, DEIS and UniPC do.
    """
    _check(schedule, steps)
    check_range("the offset of spacing=leading", offset, 0)
    size = schedule.t_max + 1 if schedule.discrete else 1000
    index = torch.arange(steps - 1, -1, -1, dtype=torch.float64) + extra
    index = index * (size // (steps + extra)) + offset
    if index[0] > size - 1:
        raise ValueError(
            f"leading spacing of {steps} steps from offset {offset} reaches index {index[0]:.0f} of "
            f"{size - 1:.0f}: use fewer steps or spacing=trailing"
        )
    if schedule.discrete:
        return index
    return schedule.t_min + index / size * (schedule.t_max - schedule.t_min)


def linspace(schedule: Schedule, steps: int, rounded: bool = True, extra: bool = False) -> Tensor:
    """Equal strides from the last time to the first, both included unless the first has no noise.

    On a discrete schedule, times are rounded to indices unless `rounded` is false (as in diffusers' Euler, Heun and
    LMS). `extra` is that of `leading`.
    """
    _check(schedule, steps)
    first = schedule.sigma(torch.tensor(schedule.t_min, dtype=torch.float64))
    if not schedule.discrete and float(first) == 0:
        return trailing(schedule, steps)
    times = torch.linspace(schedule.t_max, schedule.t_min, steps + extra, dtype=torch.float64)[:steps]
    return times.round() if schedule.discrete and rounded else times


def karras(
    schedule: Schedule, steps: int, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    """Equal steps in (sigma/alpha)^(1/rho) (Karras et al. 2022, equation 5), between the bounds of `log_snr`."""
    if not (isinstance(rho, int | float) and 0 < rho < math.inf):
        raise ValueError(f"the rho of spacing=karras is {rho!r}, but must be a positive number")
    return _between(schedule, steps, sigma_min, sigma_max, lambda ratio: ratio ** (1 / rho), lambda root: root**rho)


def log_snr(schedule: Schedule, steps: int, sigma_min: float | None = None, sigma_max: float | None = None) -> Tensor:
    """Equal steps in log-SNR (Lu et al. 2022), called `exponential` in k-diffusion.

    sigma_min and sigma_max bound sigma/alpha; the defaults are the bounds of the schedule. If those are 0 or infinite,
    they are replaced by 0.002 and 80, and in the latter case the first time is that of pure noise.
    """
    return _between(schedule, steps, sigma_min, sigma_max, torch.log, torch.exp)


def custom(
    schedule: Schedule, steps: int, times: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
) -> Tensor:
    """The listed times, or the times of the listed values of sigma/alpha, of which a final 0 is left out."""
    if (times is None) == (sigmas is None):
        raise ValueError("spacing=custom needs either a list of times or a list of sigmas (values of sigma/alpha)")
    name, given = ("times", times) if sigmas is None else ("sigmas", sigmas)
    numbers = isinstance(given, Sequence) and all(isinstance(value, int | float) for value in given)
    listed = [float(value) for value in given or ()] if numbers else []
    if name == "sigmas" and listed and listed[-1] == 0:
        listed.pop()
    decreasing = all(t > s for t, s in pairwise([math.inf, *listed]))  # false for NaN
    if not listed or not decreasing or listed[-1] < 0:
        raise ValueError(
            f"the {name} of spacing=custom must be decreasing numbers, but are {given}: list them from the noisiest "
            "to the cleanest, none below 0"
        )
    if len(listed) != steps:
        raise ValueError(f"spacing=custom lists {len(listed)} {name}, but steps is {steps}: set steps={len(listed)}")
    values = torch.tensor(listed, dtype=torch.float64)
    return _within(schedule, values if name == "times" else _times(schedule, values))


SPACINGS: dict[str, Spacing] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
    "exponential": log_snr,
    "log_snr": log_snr,
    "custom": custom,
}


def get_spacing(name: str, options: Mapping[str, Any] | None = None) -> Spacing:
    """Returns a spacing with its options bound. Raises ValueError for an unknown name or option."""
    return choose("spacing", SPACINGS, name, options or {})


def _between(
    schedule: Schedule,
    steps: int,
    sigma_min: float | None,
    sigma_max: float | None,
    forward: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
) -> Tensor:
    """Equal steps in `forward(sigma/alpha)`, both bounds included; `inverse` undoes `forward`."""
    _check(schedule, steps)
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    own = (schedule.sigma(ends) / schedule.alpha(ends)).tolist()
    low, high = (end if 0 < end < math.inf else ratio for end, ratio in zip(own, RATIOS, strict=True))
    low, high = low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    if not all(isinstance(end, int | float) for end in (low, high)) or not 0 < low < high < math.inf:
        raise ValueError(f"a spacing needs 0 < sigma_min < sigma_max, not {low} and {high}")
    from_noise = own[1] == math.inf and sigma_max is None
    first, last = forward(torch.tensor([high, low], dtype=torch.float64)).tolist()
    ratios = inverse(torch.linspace(first, last, steps - from_noise, dtype=torch.float64))
    times = _within(schedule, _times(schedule, ratios))
    return torch.cat((ends[1:], times)) if from_noise else times


def _times(schedule: Schedule, ratios: Tensor) -> Tensor:
    return schedule.time(-2 * ratios.log())


def _within(schedule: Schedule, times: Tensor) -> Tensor:
    """Clamps times to the range of the schedule. Raises ValueError if they exceed it by more than rounding."""
    low, high = schedule.t_min, schedule.t_max
    slack = 1e-9 * (high - low)
    if len(times) and not low - slack <= float(times.min()) <= float(times.max()) <= high + slack:
        raise ValueError(
            f"the spacing needs times from {float(times.min()):g} to {float(times.max()):g}, but "
            f"schedule={schedule.name} has times from {low:g} to {high:g}"
        )
    return times.clamp(low, high)


def _check(schedule: Schedule, steps: int) -> None:
    maximum = schedule.t_max + 1 if schedule.discrete else 1000
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= maximum:
        raise ValueError(f"steps is {steps!r}, but must be a whole number between 1 and {maximum:.0f}")
