"""Distributions of training times: each maps uniform numbers u in [0, 1), (b,), to times (b,)."""

from dataclasses import dataclass
from math import inf, isfinite
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule


class TimeSampler(Protocol):
    def times(self, u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Uniform:
    """Uniform over the indices of a discrete schedule, or over the time interval of a continuous one."""

    schedule: Schedule

    def times(self, u: Tensor) -> Tensor:
        return _to_time(self.schedule, u.double())


@dataclass(frozen=True)
class LogitNormal:
    """The logit of the time, as a fraction of the schedule, is normal (Esser et al. 2024, equation 19)."""

    schedule: Schedule
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_normal("logit-normal", self.mean, self.std)

    def times(self, u: Tensor) -> Tensor:
        return _to_time(self.schedule, (self.mean + self.std * torch.special.ndtri(u.double())).sigmoid())


@dataclass(frozen=True)
class LogNormal:
    """sigma/alpha is log-normal (Karras et al. 2022, table 1), clamped to the range of the schedule.

    The paper's mean is for data of standard deviation 0.5; for standard deviation 1, add ln 2 to it.
    """

    schedule: Schedule
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_normal("log-normal", self.mean, self.std)

    def times(self, u: Tensor) -> Tensor:
        log_ratio = self.mean + self.std * torch.special.ndtri(u.double())
        t = self.schedule.time(-2 * log_ratio)
        t = t.round() if self.schedule.discrete else t
        return t.clamp(self.schedule.t_min, self.schedule.t_max)


def stratified(u: Tensor, stratum: Tensor) -> Tensor:
    """Maps u (b,) in [0, 1) into each sample's stratum of [0, 1); stratum (b, 2) holds its index and their number."""
    index, count = stratum.double().unbind(1)
    return (index + u) / count


def _to_time(schedule: Schedule, fraction: Tensor) -> Tensor:
    """Maps a fraction in [0, 1] of the schedule to a time; each index of a discrete schedule has an equal share."""
    if schedule.discrete:
        return (fraction * (schedule.t_max + 1)).floor().clamp(max=schedule.t_max)
    return schedule.t_min + fraction * (schedule.t_max - schedule.t_min)


def _check_normal(name: str, mean: float, std: float) -> None:
    if not isfinite(mean) or not 0 < std < inf:
        raise ValueError(f"{name} times need a finite mean and a positive std, not {mean} and {std}")
