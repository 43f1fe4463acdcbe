"""Full trajectories of ldm's solvers and of diffusers' schedulers, with Stable Diffusion's settings.

diffusers computes alpha-bar as a float32 product, so that 1 - alpha-bar has few correct digits at the first indices,
and stores its sigmas in float32. They are checked and then replaced by ldm's in float64, so that only the solvers are
compared: to 1e-5 in float32, and to 1e-10 in float64 if the scheduler does not use float32 internally.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule, scaled_linear
from ldm.sampling.driver import no_noise
from ldm.sampling.grid import Grid, Noise, Solver

SCHEDULE = scaled_linear()
ALPHA_BAR = SCHEDULE.alpha(torch.arange(1000.0)).square()
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EPS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
NOISES = torch.randn(100, *EPS.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
WEIGHT = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 12
CONTEXT = torch.zeros(2, 1, 1)
DTYPES = [torch.float32, torch.float64]


def network(x: Tensor, time: Tensor, context: Tensor = CONTEXT) -> Tensor:
    """A small random network that depends on the time."""
    return x * 0.8 + torch.tanh(
        torch.conv2d(x, WEIGHT.to(x.dtype), padding=1) * (1 + time.view(-1, 1, 1, 1) / 1000).to(x.dtype)
    )


def at_integer_times(x: Tensor, time: Tensor, context: Tensor = CONTEXT) -> Tensor:
    """The network with rounded times, for schedulers of diffusers that truncate or round times to integers."""
    return network(x, time.round(), context)


def ours(
    solver: Solver,
    grid: Grid,
    x: Tensor,
    prediction: str = "eps",
    noise: Noise = no_noise,
    model: Callable[[Tensor, Tensor, Tensor], Tensor] = network,
    time: str | None = None,
) -> list[Tensor]:
    """Returns the state after each step of ldm's solver."""
    denoiser = Denoiser(model, grid.schedule, Prediction(prediction), time)
    return [state.x for state in solver(lambda x, t: denoiser(x, t, CONTEXT), x, grid, noise)]


def theirs(scheduler: Any, x: Tensor) -> list[Tensor]:
    """Returns the sample after each call of the network, in the scaling of the diffusers scheduler."""
    states = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t.expand(2).float()), t, x, return_dict=False)[0]
        states.append(x)
    return states


def with_table(scheduler: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Replaces the scheduler's table of alpha-bar by ldm's."""
    table = ALPHA_BAR.to(dtype)
    scheduler.alphas_cumprod = table
    scheduler.alpha_t, scheduler.sigma_t = table.sqrt(), (1 - table).sqrt()
    scheduler.lambda_t = scheduler.alpha_t.log() - scheduler.sigma_t.log()
    return scheduler


def with_sigmas(scheduler: Any, grid: Grid, twice: bool = False) -> Any:
    """Checks the scheduler's sigmas and replaces them by ldm's in float64.

    `twice` is for schedulers such as Heun that list all sigmas but the ends twice.
    """
    ratios = [point.ratio for point in grid.points]
    listed = [ratios[0], *(ratio for ratio in ratios[1:-1] for _ in range(2)), ratios[-1]] if twice else ratios
    sigmas = torch.tensor(listed, dtype=torch.float64)
    torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=2e-6, atol=0)
    scheduler.sigmas = sigmas
    return scheduler


def unscaled(states: list[Tensor], grid: Grid) -> list[Tensor]:
    """Returns x / alpha, the state in the scaling of k-diffusion."""
    return [x / point.alpha for x, point in zip(states, grid.points[1:], strict=True)]


def brownian(grid: Grid) -> Callable[[Tensor, Tensor], Tensor]:
    """k-diffusion's noise sampler: increments of a Brownian path in sigma, divided by their standard deviation.

    The path uses two of NOISES per step: one up to the midpoint of the step in log sigma, and one from there.
    """
    path = [(grid.points[0].ratio, torch.zeros_like(NOISES[0]))]
    for step, (t, s) in enumerate(pairwise(grid.points[:-1])):
        for draw, sigma in enumerate((sqrt(t.ratio * s.ratio), s.ratio)):
            before, value = path[-1]
            path.append((sigma, value + sqrt(before - sigma) * NOISES[2 * step + draw]))

    def at(sigma: Tensor) -> Tensor:
        return min(path, key=lambda point: abs(point[0] - float(sigma)))[1]

    return lambda start, end: (at(end) - at(start)) / (start - end).abs().sqrt()


def noise_queue(dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """Replaces diffusers' randn_tensor: returns NOISES in order."""
    queue: Iterator[Tensor] = iter(NOISES.to(dtype))
    return lambda *_, **__: next(queue)


def fixed_noise(dtype: torch.dtype = torch.float32) -> Noise:
    return lambda draw: NOISES[draw].to(dtype)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Compares states to 1e-5 (float32) or 1e-10 (float64) of the largest value of each."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        bound = 1e-5 if a.dtype == torch.float32 else 1e-10
        torch.testing.assert_close(a, e, rtol=0, atol=bound * float(e.abs().max()))


def grid_to_index_0(schedule: Schedule, times: Tensor) -> Grid:
    """Returns a grid that ends at index 0 instead of the clean end, as SD's set_alpha_to_one=False does."""
    return Grid.of(schedule, torch.cat((times, torch.zeros(1))), clean=False)
