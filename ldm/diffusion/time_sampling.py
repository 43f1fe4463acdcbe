"""Which times a training step sees: a map from uniform numbers u in [0, 1) (b,) to times (b,)."""

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
    """Every index, or every time of the interval, equally often."""

    schedule: Schedule

    def times(self, u: Tensor) -> Tensor:
        return _stretch(self.schedule, u.double())


@dataclass(frozen=True)
class LogitNormal:
    """The logit of the time, as a share of the schedule, is normal (Esser et al. 2024, equation 19)."""

    schedule: Schedule
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_normal("logit-normal", self.mean, self.std)

    def times(self, u: Tensor) -> Tensor:
        return _stretch(self.schedule, (self.mean + self.std * torch.special.ndtri(u.double())).sigmoid())


@dataclass(frozen=True)
class LogNormal:
    """sigma/alpha is log-normal (Karras et al. 2022, table 1), as far as the schedule reaches.

    The paper's mean is for data of deviation 0.5; the same noise on data of deviation 1 has mean + ln 2.
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
    """u (b,) in [0, 1) moved into each sample's own part of [0, 1); stratum (b, 2) says which of how many."""
    which, count = stratum.double().unbind(1)
    return (which + u) / count


def _stretch(schedule: Schedule, share: Tensor) -> Tensor:
    """A share in [0, 1] of the schedule as a time; the indices of a discrete one have equal shares."""
    if schedule.discrete:
        return (share * (schedule.t_max + 1)).floor().clamp(max=schedule.t_max)
    return schedule.t_min + share * (schedule.t_max - schedule.t_min)


def _check_normal(name: str, mean: float, std: float) -> None:
    if not isfinite(mean) or not 0 < std < inf:
        raise ValueError(f"{name} times need a finite mean and a positive std, not {mean} and {std}")
