"""The noise levels that a solver walks along, and what it is made of."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule

Noise = Callable[[int], Tensor]  # draw → standard normal numbers in the shape of x; solvers count their draws


class Point(NamedTuple):
    """A noise level, in plain numbers, so that solvers keep the type of x and wait for no device."""

    time: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        if self.alpha == 0 or self.sigma == 0:
            return -math.inf if self.alpha == 0 else math.inf
        return 2 * (math.log(self.alpha) - math.log(self.sigma))

    @property
    def ratio(self) -> float:
        """sigma / alpha, which k-diffusion calls sigma."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def scale(self) -> float:
        return self.alpha + self.sigma

    @property
    def tau(self) -> float:
        """The share of noise, sigma / (alpha + sigma): 1 at pure noise, 0 at the clean end."""
        return self.sigma / self.scale


CLEAN = Point(time=math.nan, alpha=1.0, sigma=0.0)  # no solver asks the denoiser about the clean end


@dataclass(frozen=True)
class Grid:
    """Points of falling noise: a solver takes one step from each to the next. Between them lies the schedule."""

    points: tuple[Point, ...]
    schedule: Schedule

    @classmethod
    def of(cls, schedule: Schedule, times: Tensor, clean: bool = True) -> "Grid":
        """The schedule at falling times (n,), with the clean end appended unless told otherwise."""
        points = _points(schedule, times) + (CLEAN,) * clean
        noise = [point.tau for point in points]
        if len(noise) < 2 or not all(t > s for t, s in pairwise(noise)):
            raise ValueError(f"a sampler's noise must fall at each step, but its times are {times.tolist()}")
        return cls(points, schedule)

    def at(self, time: float) -> Point:
        """The schedule at a time, which is held within the schedule's own."""
        held = min(max(time, self.schedule.t_min), self.schedule.t_max)
        return _points(self.schedule, torch.tensor([held], dtype=torch.float64))[0]

    def at_log_snr(self, log_snr: float) -> Point:
        return self.at(float(self.schedule.time(torch.tensor(log_snr, dtype=torch.float64))))

    def start(self, eps: Tensor, x0: Tensor | None = None) -> Tensor:
        """The state at the first point: sigma·eps, with alpha·x0 where there are data to start from."""
        first = self.points[0]
        return first.sigma * eps if x0 is None else first.alpha * x0 + first.sigma * eps


def _points(schedule: Schedule, times: Tensor) -> tuple[Point, ...]:
    levels = torch.stack((times.double(), schedule.alpha(times), schedule.sigma(times)), dim=1)
    return tuple(Point(*level) for level in levels.tolist())


class State(NamedTuple):
    """What a solver yields after each step: x at the next point, and the x0 that led there."""

    step: int
    x: Tensor
    x0: Tensor


class Solver(Protocol):
    def __call__(self, denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, /) -> Iterator[State]: ...
