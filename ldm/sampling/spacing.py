"""At which times a sampler calls the denoiser: float64 (steps,), falling."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.sampling.options import check_range, choose

Spacing = Callable[[Schedule, int], Tensor]
RATIOS = 0.002, 80.0  # of sigma / alpha, where a schedule's own end is 0 or infinite (Karras et al. 2022, table 1)


def trailing(schedule: Schedule, steps: int) -> Tensor:
    """Equal strides back from the last time (Lin et al. 2024, table 2, as are leading and linspace)."""
    _check(schedule, steps)
    index = torch.arange(steps, dtype=torch.float64)
    if not schedule.discrete:
        return schedule.t_max - index * ((schedule.t_max - schedule.t_min) / steps)
    size = schedule.t_max + 1
    return (size - index * (size / steps)).round() - 1


def leading(schedule: Schedule, steps: int, offset: int = 1, extra: bool = False) -> Tensor:
    """Whole strides up from index `offset` (SD's steps_offset), so that the last time is left out.

    A continuous schedule is cut into a thousand. `extra` makes the strides those of one more step, of which the
    last is left out, as diffusers' DPM-Solver, DEIS and UniPC do.
    """
    _check(schedule, steps)
    check_range("the offset of spacing=leading", offset, 0)
    size = schedule.t_max + 1 if schedule.discrete else 1000
    index = torch.arange(steps - 1, -1, -1, dtype=torch.float64) + extra
    index = index * (size // (steps + extra)) + offset
    if index[0] > size - 1:
        raise ValueError(
            f"leading spacing of {steps} steps from offset {offset} reaches index {index[0]:.0f} of "
            f"{size - 1:.0f}: take fewer steps or spacing=trailing"
        )
    if schedule.discrete:
        return index
    return schedule.t_min + index / size * (schedule.t_max - schedule.t_min)


def linspace(schedule: Schedule, steps: int, rounded: bool = True, extra: bool = False) -> Tensor:
    """From the last time to the first, both included unless the first is clean.

    On a discrete schedule times are indices unless `rounded` is false (as in diffusers' Euler, Heun and LMS).
    `extra` is that of `leading`.
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
    """Equal steps in (sigma/alpha)^(1/rho) (Karras et al. 2022, equation 5), between bounds as in `log_snr`."""
    if not (isinstance(rho, int | float) and 0 < rho < math.inf):
        raise ValueError(f"the rho of spacing=karras is {rho!r}, but must be a positive number")
    return _between(schedule, steps, sigma_min, sigma_max, lambda ratio: ratio ** (1 / rho), lambda root: root**rho)


def log_snr(schedule: Schedule, steps: int, sigma_min: float | None = None, sigma_max: float | None = None) -> Tensor:
    """Equal steps in log-SNR (Lu et al. 2022), which is `exponential` in k-diffusion.

    sigma_min and sigma_max bound sigma/alpha, and are the schedule's own by default. Where that is no number,
    they are 0.002 and 80, and the first time is pure noise itself.
    """
    return _between(schedule, steps, sigma_min, sigma_max, torch.log, torch.exp)


def custom(
    schedule: Schedule, steps: int, times: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
) -> Tensor:
    """The times that are listed, or those at which sigma/alpha is as listed; a 0 at the end of sigmas is left out."""
    if (times is None) == (sigmas is None):
        raise ValueError("spacing=custom needs a list of times or one of sigmas (of sigma/alpha)")
    name, given = ("times", times) if sigmas is None else ("sigmas", sigmas)
    numbers = isinstance(given, Sequence) and all(isinstance(value, int | float) for value in given)
    listed = [float(value) for value in given or ()] if numbers else []
    if name == "sigmas" and listed and listed[-1] == 0:
        listed.pop()
    falling = all(t > s for t, s in pairwise([math.inf, *listed]))  # NaN does not
    if not listed or not falling or listed[-1] < 0:
        raise ValueError(
            f"the {name} of spacing=custom must be numbers that fall, but are {given}: list them from the noisiest "
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
    """A spacing with its options. Raises ValueError for names that are not known."""
    return choose("spacing", SPACINGS, name, options or {})


def _between(
    schedule: Schedule,
    steps: int,
    sigma_min: float | None,
    sigma_max: float | None,
    there: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor],
) -> Tensor:
    """Equal steps of `there(sigma/alpha)`, both bounds included."""
    _check(schedule, steps)
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    own = (schedule.sigma(ends) / schedule.alpha(ends)).tolist()
    low, high = (end if 0 < end < math.inf else ratio for end, ratio in zip(own, RATIOS, strict=True))
    low, high = low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    if not all(isinstance(end, int | float) for end in (low, high)) or not 0 < low < high < math.inf:
        raise ValueError(f"a spacing needs 0 < sigma_min < sigma_max, not {low} and {high}")
    from_noise = own[1] == math.inf and sigma_max is None
    first, last = there(torch.tensor([high, low], dtype=torch.float64)).tolist()
    ratios = back(torch.linspace(first, last, steps - from_noise, dtype=torch.float64))
    times = _within(schedule, _times(schedule, ratios))
    return torch.cat((ends[1:], times)) if from_noise else times


def _times(schedule: Schedule, ratios: Tensor) -> Tensor:
    return schedule.time(-2 * ratios.log())


def _within(schedule: Schedule, times: Tensor) -> Tensor:
    """The times, if they are the schedule's but for rounding."""
    low, high = schedule.t_min, schedule.t_max
    slack = 1e-9 * (high - low)
    if len(times) and not low - slack <= float(times.min()) <= float(times.max()) <= high + slack:
        raise ValueError(
            f"the spacing asks for times from {float(times.min()):g} to {float(times.max()):g}, but "
            f"schedule={schedule.name} has those from {low:g} to {high:g}"
        )
    return times.clamp(low, high)


def _check(schedule: Schedule, steps: int) -> None:
    most = schedule.t_max + 1 if schedule.discrete else 1000
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
        raise ValueError(f"steps is {steps!r}, but must lie between 1 and {most:.0f} and be a whole number")
