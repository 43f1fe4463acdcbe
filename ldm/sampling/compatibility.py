"""Checks that settings work together, and says how to fix each contradiction."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.guidance import interval_to_times
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.weighting import Weighting
from ldm.sampling.driver import get_solver
from ldm.sampling.grid import Grid, Point, Solver
from ldm.sampling.spacing import get_spacing

MIN_WEIGHT, MAX_WEIGHT = 1e-12, 1e6
MAX_FIRST_ALPHA = 0.01  # upper bound of alpha at the first sampled time on a schedule that ends in pure noise
MAX_AMPLIFICATION = 100.0  # of the network's error in the state after the first step
# Limits of the standard deviation ("width") of a sampler's output, relative to that of the data. The excess variance,
# width² - 1 times that of the data, is noise in the images: half the data's variance at the first limit, three times at
# the second.
VISIBLE_WIDTH, MAX_WIDTH = 1.25, 2.0
TRIAL_SAMPLES = 4096  # determine a standard deviation to 1 %
MAX_TRIAL_STEPS = 200  # trying a sampler in 200 steps takes 0.1 s; more steps are rarer and safer


@dataclass(frozen=True)
class Setup:
    """The settings of a run or a model; no rule applies to settings that are None or missing.

    `time` is that of the `Denoiser`. `sampling` has the keys of the pipeline's Settings, of which the rules read
    sampler, spacing, steps, sampler_options, spacing_options, guidance and guidance_interval (in sigma/alpha).
    """

    schedule: Schedule
    prediction: Prediction
    weighting: Weighting | None = None
    time: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    offset_noise: float = 0.0
    caption_dropout: float | None = None

    @property
    def end(self) -> Point:
        return self.at(self.schedule.t_max)

    def at(self, time: float) -> Point:
        t = torch.tensor([time], dtype=torch.float64)
        return Point(time, float(self.schedule.alpha(t)), float(self.schedule.sigma(t)))

    def divisor(self, point: Point) -> float:
        """Returns the divisor in the conversion of the network's output to x0."""
        alpha, sigma = (torch.tensor(level, dtype=torch.float64) for level in (point.alpha, point.sigma))
        return abs(float(self.prediction.determinant(alpha, sigma)))

    def grid(self) -> Grid | None:
        """Returns the sampling grid, or None without a spacing. Raises ValueError for an invalid spacing or steps."""
        if "spacing" not in self.sampling:
            return None
        spacing = get_spacing(self.sampling["spacing"], self.sampling.get("spacing_options", {}))
        times = spacing(self.schedule, self.sampling["steps"])
        return Grid.to_final(self.schedule, times, self.sampling.get("final_sigma", "zero"))

    def solver(self) -> Solver | None:
        """Returns the solver, or None without a sampler. Raises ValueError for an unknown name or invalid options."""
        if "sampler" not in self.sampling:
            return None
        return get_solver(self.sampling["sampler"], self.sampling.get("sampler_options", {}))


def check(setup: Setup, warn: Callable[[str], object] = warnings.warn) -> None:
    """Raises ValueError for settings that contradict one another, and warns of those that work badly."""
    if found := contradictions(setup):
        raise ValueError("; ".join(found))
    for caution in cautions(setup):
        warn(caution)


def cautions(setup: Setup) -> list[str]:
    """Returns one sentence for each combination of valid settings that makes visibly worse images than others."""
    grid, solver = setup.grid(), setup.solver()
    if grid is None or solver is None:
        return []
    width = _width(setup, grid, solver)
    return [_too_wide(setup, width, "adds visible noise")] if VISIBLE_WIDTH <= width < MAX_WIDTH else []


def contradictions(setup: Setup) -> list[str]:
    """Returns one sentence for each combination of settings that cannot work."""
    rules = _prediction, _weighting, _time, _offset_noise, _dropout
    found = [sentence for rule in rules for sentence in rule(setup)]
    try:
        grid, solver = setup.grid(), setup.solver()
        found += _interval(setup, grid)
    except ValueError as error:
        return [*found, str(error)]
    if grid is not None:
        found += [*_spacing(setup, grid), *_first_step(setup, grid)]
    if grid is not None and solver is not None:
        found += _sampler(setup, grid, solver)
    return found


def _prediction(setup: Setup) -> Iterator[str]:
    if setup.end.alpha == 0 and setup.divisor(setup.end) == 0:
        yield (
            f"prediction={setup.prediction.name} divides by alpha, which is 0 at the end of "
            f"schedule={setup.schedule.name}: use prediction=v or prediction=flow"
        )


def _weighting(setup: Setup) -> Iterator[str]:
    if setup.weighting is None:
        return
    names = f"weighting={setup.weighting.name} under prediction={setup.prediction.name}"
    ends = torch.tensor([setup.schedule.t_min, setup.schedule.t_max], dtype=torch.float64)
    weights = setup.weighting(setup.schedule.alpha(ends), setup.schedule.sigma(ends), setup.prediction)
    if float(weights[1]) < MIN_WEIGHT:
        yield (
            f"{names} gives weight 0 to the end of schedule={setup.schedule.name}, so the first sampling step is "
            "not trained: use weighting=uniform"
        )
    if float(weights.max()) > MAX_WEIGHT:
        side = "start" if weights[0] > weights[1] else "end"
        yield (
            f"{names} gives the {side} of schedule={setup.schedule.name} a weight of {float(weights.max()):.0e}, "
            "which makes every other time negligible: use prediction=v"
        )


def _time(setup: Setup) -> Iterator[str]:
    if setup.end.alpha == 0 and setup.time == "log_sigma":
        yield (
            f"time=log_sigma is infinite at the end of schedule={setup.schedule.name}, where alpha is 0: "
            "use time=thousand"
        )


def _offset_noise(setup: Setup) -> Iterator[str]:
    if setup.end.alpha == 0 and setup.offset_noise:
        yield (
            f"offset_noise={setup.offset_noise:g} trains on pure noise of varying brightness at the end of "
            f"schedule={setup.schedule.name}, but sampling starts from plain noise, so the brightness of images "
            "would vary too little: use offset_noise=0, which that schedule does not need"
        )


def _dropout(setup: Setup) -> Iterator[str]:
    guidance = setup.sampling.get("guidance", 1)
    if setup.caption_dropout == 0 and guidance != 1:
        yield (
            f"guidance={guidance:g} needs the network's output without a prompt, which caption_dropout=0 "
            "does not train: use caption_dropout=0.1 or a guidance of 1"
        )


def _interval(setup: Setup, grid: Grid | None) -> Iterator[str]:
    interval = setup.sampling.get("guidance_interval")
    if interval is None:
        return
    if not _is_interval(interval):
        yield (
            f"the guidance interval is {interval}, but must be a low and a high sigma/alpha, such as [0.3, 5], or "
            "[2, null] without an upper end"
        )
        return
    low, high = interval_to_times(setup.schedule, tuple(interval))
    sampled = [point.time for point in grid.points[:-1]] if grid else []
    outside = not any(low <= t <= high for t in sampled) if grid else high < setup.schedule.t_min
    if outside or low > setup.schedule.t_max:
        yield (
            f"the guidance interval {list(interval)} contains no sampled time of schedule={setup.schedule.name}, "
            "so guidance is never applied: give it in sigma/alpha, such as [0.3, 5]"
        )


def _is_interval(value: Any) -> bool:
    if not isinstance(value, Sequence) or len(value) != 2 or not isinstance(value[0], int | float):
        return False
    return value[1] is None or isinstance(value[1], int | float)


def _spacing(setup: Setup, grid: Grid) -> Iterator[str]:
    if setup.end.alpha == 0 and grid.points[0].alpha > MAX_FIRST_ALPHA:
        yield (
            f"spacing={setup.sampling['spacing']} leaves out the end of schedule={setup.schedule.name}, the only time "
            "of pure noise, from which sampling starts: use spacing=trailing"
        )


def _first_step(setup: Setup, grid: Grid) -> Iterator[str]:
    t, s = grid.points[:2]
    divisor = setup.divisor(t)
    error = abs(s.alpha * t.sigma - s.sigma * t.alpha)  # in the DDIM step, times the divisor, for an output error of 1
    if divisor > 0 and error > MAX_AMPLIFICATION * divisor:
        yield (
            f"prediction={setup.prediction.name} under schedule={setup.schedule.name} with {_spacing_and_steps(setup)} "
            f"multiplies errors of the network by {error / divisor:.0f} in the first step: use prediction=v or "
            "spacing=leading"
        )


def _spacing_and_steps(setup: Setup) -> str:
    return f"spacing={setup.sampling['spacing']} and steps={setup.sampling['steps']}"


def _sampler(setup: Setup, grid: Grid, solver: Solver) -> Iterator[str]:
    width = _width(setup, grid, solver)
    if not width < MAX_WIDTH:
        yield _too_wide(setup, width, "fails")


def _width(setup: Setup, grid: Grid, solver: Solver) -> float:
    """Samples data of standard deviation 1/2 using their exact denoiser; returns how many times wider the samples are.

    Too many steps to try are taken to be exact.
    """
    if setup.sampling["steps"] > MAX_TRIAL_STEPS:
        return 1.0
    generator = torch.Generator().manual_seed(0)

    def noise(draw: int) -> Tensor:
        return torch.randn(TRIAL_SAMPLES, dtype=torch.float64, generator=generator)

    def denoise(x: Tensor, t: float) -> Tensor:
        point = setup.at(t)
        return x * (point.alpha / (point.alpha**2 + 4 * point.sigma**2))

    x = grid.start(noise(0))
    for state in solver(denoise, x, grid, noise):
        x = state.x
    return float(x.std()) / 0.5


def _too_wide(setup: Setup, width: float, verdict: str) -> str:
    return (
        f"sampler={setup.sampling['sampler']} with {_spacing_and_steps(setup)} {verdict} under "
        f"schedule={setup.schedule.name}: even with an exact network, the standard deviation of samples is {width:.3g} "
        "times that of the data; use sampler=dpmpp_2m, another spacing or more steps"
    )
