"""Grids of noise levels, and the interface of the solvers that sample along them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule
from ldm.sampling.options import check_choice

Noise = Callable[[int], Tensor]  # draw → standard normal numbers of the shape of x; solvers count their draws


class Point(NamedTuple):
    """A noise level in Python floats, so that solvers keep the dtype of x and do not synchronise the device."""

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
        """The fraction of noise, sigma / (alpha + sigma): 1 at pure noise, 0 at the clean end."""
        return self.sigma / self.scale


FINAL_SIGMAS = "zero", "min"
CLEAN = Point(time=math.nan, alpha=1.0, sigma=0.0)  # no solver calls the denoiser at the clean end


@dataclass(frozen=True)
class Grid:
    """Points of decreasing noise: a solver takes one step from each to the next.

    The schedule gives the noise levels between them.
    """

    points: tuple[Point, ...]
    schedule: Schedule

    @classmethod
    def of(cls, schedule: Schedule, times: Tensor, clean: bool = True) -> "Grid":
        """Returns the points of the schedule at decreasing times (n,), followed by the clean end if `clean`."""
        points = _points(schedule, times) + (CLEAN,) * clean
        noise = [point.tau for point in points]
        if len(noise) < 2 or not all(t > s for t, s in pairwise(noise)):
            raise ValueError(f"the noise level must decrease at each step, but the times are {times.tolist()}")
        return cls(points, schedule)

    @classmethod
    def to_final(cls, schedule: Schedule, times: Tensor, final_sigma: str = "zero") -> "Grid":
        """Returns the points at decreasing times, followed by the clean end or, with final_sigma=min, the first time.

        The noise of the schedule's first time is then left in the sample, as by diffusers with set_alpha_to_one=False
        or final_sigmas_type="sigma_min".
        """
        check_choice("final_sigma", final_sigma, *FINAL_SIGMAS)
        if final_sigma == "zero":
            return cls.of(schedule, times)
        first = torch.tensor([schedule.t_min], dtype=torch.float64)
        slack = 1e-6 * (schedule.t_max - schedule.t_min)  # rounding error of a spacing that ends at the first time
        times = times[times > first + slack] if len(times) > 1 else times
        return cls.of(schedule, torch.cat((times.double(), first)), clean=False)

    def at(self, time: float) -> Point:
        """Returns the point of the schedule at a time, which is clamped to the range of the schedule."""
        clamped = min(max(time, self.schedule.t_min), self.schedule.t_max)
        return _points(self.schedule, torch.tensor([clamped], dtype=torch.float64))[0]

    def at_log_snr(self, log_snr: float) -> Point:
        return self.at(float(self.schedule.time(torch.tensor(log_snr, dtype=torch.float64))))

    def start(self, eps: Tensor, x0: Tensor | None = None) -> Tensor:
        """Returns the state at the first point: sigma·eps, plus alpha·x0 if there are data to start from."""
        first = self.points[0]
        return first.sigma * eps if x0 is None else first.alpha * x0 + first.sigma * eps


def _points(schedule: Schedule, times: Tensor) -> tuple[Point, ...]:
    levels = torch.stack((times.double(), schedule.alpha(times), schedule.sigma(times)), dim=1)
    return tuple(Point(*level) for level in levels.tolist())


class State(NamedTuple):
    """The result of a solver's step: x at the next point, and the estimate of x0 that the step used."""

    step: int
    x: Tensor
    x0: Tensor


class Solver(Protocol):
    def __call__(self, denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, /) -> Iterator[State]: ...
