"""Measures the error of every sampler against exact answers: `ldm bench solvers --json F` (see README.md)."""

import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from experiments.solvers.oracle import GAUSSIAN, PROBLEMS, Mixture, Problem
from experiments.solvers.speed import speeds
from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.progress import Progress
from ldm.sampling.driver import SAMPLERS, sample
from ldm.sampling.grid import Grid, Solver
from ldm.sampling.multistep import dpmpp_2m, dpmpp_3m, dpmpp_3m_sde, unipc
from ldm.sampling.noise_multistep import deis, lms, pndm
from ldm.sampling.one_step import dpmpp_2s, edm, heun
from ldm.sampling.spacing import SPACINGS

NFES = 4, 5, 8, 10, 16, 20, 32, 50, 64, 128, 256, 512
FITTED = 128, 152, 181, 215, 256, 304, 362, 431, 512  # network calls at which the order is fitted
LAMBDAS = -6.0, 3.0  # range of half the log-SNR for the fit
SPACED = "trailing", "leading", "linspace", "karras", "log_snr"
FLOW, STABLE_DIFFUSION = Flow(), scaled_linear()
POINTS, SAMPLES, DIRECTIONS = 256, 8192, 64


@dataclass(frozen=True)
class Candidate:
    """A sampler with options, and its theoretical order of convergence.

    The order is that of each path's error, or, for stochastic samplers, of the distribution's error on Gaussian data.
    """

    solver: Solver
    theory: int
    stochastic: bool = False


def _plain(name: str, theory: int, stochastic: bool = False) -> Candidate:
    return Candidate(SAMPLERS[name], theory, stochastic)


# Every sampler with its defaults, but without lowering the order at the end, and well-known variants.
CANDIDATES: dict[str, Candidate] = {
    "ddim": _plain("ddim", 1),
    "euler": _plain("euler", 1),
    "heun": _plain("heun", 2),
    "heun_flow": Candidate(partial(heun, path="flow"), 2),
    "lms": _plain("lms", 4),
    "pndm": _plain("pndm", 2),
    "pndm_plms": Candidate(partial(pndm, prk=False), 2),
    "dpmpp_2s": _plain("dpmpp_2s", 2),
    "dpmpp_2m": Candidate(partial(dpmpp_2m, lower_order_final=False), 2),
    "dpmpp_3m": Candidate(partial(dpmpp_3m, lower_order_final=False), 3),
    "dpmpp_3m_half": Candidate(partial(dpmpp_3m, curvature="half", lower_order_final=False), 2),
    "unip_1": Candidate(partial(unipc, order=1, corrector=False), 1),
    "unip_2": Candidate(partial(unipc, order=2, corrector=False, lower_order_final=False), 2),
    "unip_3": Candidate(partial(unipc, order=3, corrector=False, lower_order_final=False), 3),
    "unipc_1": Candidate(partial(unipc, order=1), 2),
    "unipc": Candidate(partial(unipc, lower_order_final=False), 3),
    "unipc_3": Candidate(partial(unipc, order=3, lower_order_final=False), 4),
    "deis": Candidate(partial(deis, lower_order_final=False), 3),
    "deis_log_ratio": Candidate(partial(deis, variable="log_ratio", lower_order_final=False), 3),
    "lms_2": Candidate(partial(lms, order=2), 2),
    "ddpm": _plain("ddpm", 1, True),
    "euler_a": _plain("euler_a", 1, True),
    "dpmpp_2s_a": Candidate(partial(dpmpp_2s, eta=1.0), 2, True),
    "dpmpp_sde": _plain("dpmpp_sde", 2, True),
    "dpmpp_2m_sde": _plain("dpmpp_2m_sde", 2, True),
    "dpmpp_3m_sde": Candidate(partial(dpmpp_3m_sde, curvature="exact", lower_order_final=False), 2, True),
    "dpmpp_3m_sde_diffusers": Candidate(partial(dpmpp_3m_sde, curvature="diffusers", lower_order_final=False), 1, True),
    "edm": Candidate(
        partial(edm, s_churn=10.0), 2, True
    ),  # with more, a step reaches the maximum noise that it may add
}
# Samplers with the users' defaults, for the comparison to the clean end.
IN_USE: dict[str, Solver] = {
    **SAMPLERS,
    "heun_flow": CANDIDATES["heun_flow"].solver,
    "unipc_3": partial(unipc, order=3),
    "deis_log_ratio": partial(deis, variable="log_ratio"),
    "pndm_plms": CANDIDATES["pndm_plms"].solver,
}
STOCHASTIC = [name for name in SAMPLERS if name in CANDIDATES and CANDIDATES[name].stochastic]


def measure() -> dict[str, Any]:
    """Returns all measurements as plain data."""
    deterministic = [problem for problem in PROBLEMS if problem.data is not GAUSSIAN]
    progress = Progress(len(CANDIDATES) + (len(deterministic) + 1) * len(SPACED) * len(IN_USE))
    solvers = {}
    for name, candidate in CANDIDATES.items():
        solvers[name] = order(candidate)
        progress.step()
    return {
        "solvers": solvers,
        "paths": {problem.name: paths(problem, progress) for problem in deterministic},
        "distribution": distribution(PROBLEMS[1].data, progress),
        "speed": speeds(),
        "provenance": {"torch": torch.__version__, "python": platform.python_version(), "cpu": platform.processor()},
    }


def order(candidate: Candidate) -> dict[str, Any]:
    """Returns the fitted order with its 95 % interval, and the errors by number of network calls."""
    found: dict[int, float] = {}
    error = partial(moment_error, candidate.solver) if candidate.stochastic else partial(path_error, candidate.solver)
    for nfe in sorted({*NFES, *FITTED}):
        found[nfe] = error(steps_of(candidate.solver, nfe, log_snr_grid))
    steps = [steps_of(candidate.solver, nfe, log_snr_grid) for nfe in FITTED]
    fitted, low, high = fit(steps, [found[nfe] for nfe in FITTED])
    errors = {str(nfe): found[nfe] for nfe in NFES}
    return {"order": fitted, "theory": candidate.theory, "low": low, "high": high, "errors": errors}


def fit(steps: list[int], errors: list[float]) -> tuple[float, float, float]:
    """Returns the negated slope of log error against log steps, and the ends of its 95 % interval."""
    line = stats.linregress(np.log(steps), np.log(errors))
    margin = stats.t.ppf(0.975, len(steps) - 2) * line.stderr
    return -line.slope, -line.slope - margin, -line.slope + margin


def log_snr_grid(steps: int) -> Grid:
    """Returns a grid with equal steps in log-SNR on the flow schedule, without a clean end."""
    lambdas = torch.linspace(*LAMBDAS, steps + 1, dtype=torch.float64)
    return Grid.of(FLOW, FLOW.time(2 * lambdas), clean=False)


def path_error(solver: Solver, steps: int) -> float:
    """Returns the root mean square distance from the exact ends of paths for the mixture of five."""
    problem, grid = PROBLEMS[1], log_snr_grid(steps)
    first, last = grid.points[0], grid.points[-1]
    end = sample(solver, problem.denoiser(FLOW), first.sigma * starts(), grid)
    return rms(end - last.sigma * exact_ends())


def moment_error(solver: Solver, steps: int) -> float:
    """Returns the Wasserstein distance between the final distribution and the exact one, for Gaussian data.

    The denoiser is affine, so the final state is an affine function of the initial state and of each noise tensor. The
    batch has one row that starts at the mean, one that starts one standard deviation away from it, and one for each
    noise tensor, which is 1 there and 0 in all other rows.
    """
    mean, std = float(GAUSSIAN.means[0, 0]), float(GAUSSIAN.stds[0])
    data = Problem("gaussian", Mixture(torch.ones(1).double(), GAUSSIAN.means[:1, :1], GAUSSIAN.stds))
    grid = log_snr_grid(steps)
    (start, width), (target, target_width) = (
        (point.alpha * mean, math.hypot(point.alpha * std, point.sigma)) for point in (grid.points[0], grid.points[-1])
    )
    x = torch.full((2 + 2 * steps, 1), start, dtype=torch.float64)
    x[1] += width

    def noise(draw: int) -> Tensor:
        return torch.zeros_like(x).index_fill_(0, torch.tensor(2 + draw), 1.0)

    end = sample(solver, data.denoiser(FLOW), x, grid, noise).flatten()
    return math.hypot(float(end[0]) - target, float((end[1:] - end[0]).norm()) - target_width)


def paths(problem: Problem, progress: Progress) -> dict[str, dict[str, dict[str, float]]]:
    """Returns root mean square distances from the exact end, by spacing, sampler and number of network calls.

    On Stable Diffusion's schedule, at the clean end; the exact path starts at the spacing's first time.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for spacing in SPACED:
        found[spacing] = {}
        for sampler, solver in IN_USE.items():
            if sampler not in STOCHASTIC:
                found[spacing][sampler] = dict(_errors(problem, spacing, solver))
            progress.step()
    return found


def _errors(problem: Problem, spacing: str, solver: Solver) -> Iterator[tuple[str, float]]:
    for nfe, grid in _affordable(spacing, solver):
        end = sample(solver, problem.denoiser(STABLE_DIFFUSION), grid.start(starts()), grid)
        yield nfe, rms(end - clean_ends(problem.name, round(math.log(grid.points[0].ratio), 9)))


def distribution(data: Mixture, progress: Progress) -> dict[str, Any]:
    """Returns sliced Wasserstein distances from the data, by spacing, sampler and number of network calls.

    Sampling goes from sigma·eps at the spacing's first time to the clean end on Stable Diffusion's schedule. `floor` is
    the smallest and the largest distance of ten sets of the same number of exact samples.
    """
    problem = Problem("mixture", data)
    generator = torch.Generator().manual_seed(1)
    truth = projected(data.sample(32 * SAMPLES, generator))
    floors = [sliced_wasserstein(data.sample(SAMPLES, generator), truth) for _ in range(10)]
    found: dict[str, Any] = {"floor": [min(floors), max(floors)]}
    for spacing in SPACED:
        found[spacing] = {}
        for sampler, solver in IN_USE.items():
            found[spacing][sampler] = dict(_distances(problem, spacing, solver, truth))
            progress.step()
    return found


def _distances(problem: Problem, spacing: str, solver: Solver, truth: Tensor) -> Iterator[tuple[str, float]]:
    for nfe, grid in _affordable(spacing, solver):
        generator = torch.Generator().manual_seed(2)

        def noise(draw: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(SAMPLES, 2, dtype=torch.float64, generator=generator)

        end = sample(solver, problem.denoiser(STABLE_DIFFUSION), grid.start(noise(0)), grid, noise)
        yield nfe, sliced_wasserstein(end, truth)


def _affordable(spacing: str, solver: Solver) -> Iterator[tuple[str, Grid]]:
    """Yields the longest grid of at least two steps for each number of network calls."""

    def layout(steps: int) -> Grid:
        return Grid.of(STABLE_DIFFUSION, SPACINGS[spacing](STABLE_DIFFUSION, steps))

    for nfe in NFES:
        grid = layout(steps_of(solver, nfe, layout))
        if len(grid.points) > 2 and calls(solver, grid) <= nfe:
            yield str(nfe), grid


def projected(x: Tensor) -> Tensor:
    """Returns the sorted projections (n, directions) of x (n, 2) on evenly spaced directions."""
    angles = torch.arange(DIRECTIONS, dtype=torch.float64) * (math.pi / DIRECTIONS)
    return (x @ torch.stack((angles.cos(), angles.sin()))).sort(0).values


def sliced_wasserstein(x: Tensor, truth: Tensor) -> float:
    """Returns the root mean square over directions of the 2-Wasserstein distance of projections.

    `truth` is `projected` already, and has 32 times as many samples as x.
    """
    quantiles = truth.view(len(x), -1, DIRECTIONS).mean(1)
    return rms(projected(x) - quantiles) / math.sqrt(DIRECTIONS)


def rms(difference: Tensor) -> float:
    """Returns the root mean square length of the rows of (n, d)."""
    return float(difference.square().sum(1).mean().sqrt())


def calls(solver: Solver, grid: Grid) -> int:
    """Returns the number of network calls of the solver."""
    count, zero = 0, torch.zeros(1, 1, dtype=torch.float64)

    def denoise(x: Tensor, t: float) -> Tensor:
        nonlocal count
        count += 1
        return x

    sample(solver, denoise, zero, grid, lambda draw: zero)
    return count


def steps_of(solver: Solver, nfe: int, layout: Callable[[int], Grid]) -> int:
    """Returns the largest number of steps with at most `nfe` calls, or 1; calls grow linearly after a few steps."""
    eight, sixteen = (calls(solver, layout(steps)) for steps in (8, 16))
    guess = 8 + (nfe - eight) * 8 // (sixteen - eight)
    if guess >= 8:
        return guess
    return max((steps for steps in range(1, 8) if calls(solver, layout(steps)) <= nfe), default=1)


@cache
def starts() -> Tensor:
    return torch.randn(POINTS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@cache
def exact_ends() -> Tensor:
    """Returns the exact x / sigma at the last lambda, starting from eps at the first."""
    return PROBLEMS[1].exact(starts(), -LAMBDAS[0], -LAMBDAS[1])


@cache
def clean_ends(name: str, log_ratio: float) -> Tensor:
    (problem,) = (problem for problem in PROBLEMS if problem.name == name)
    return problem.exact(starts(), log_ratio)
