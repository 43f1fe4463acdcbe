"""Runs a solver."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.grid import Grid, Noise, Solver
from ldm.sampling.multistep import dpmpp_2m
from ldm.sampling.one_step import ddim, ddpm, euler, heun

SAMPLERS: dict[str, Solver] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}


def no_noise(step: int) -> Tensor:
    raise ValueError("this sampler draws noise at each step: pass it as `noise`")


@torch.no_grad()
def sample(
    solver: Solver,
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise = no_noise,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Walks x from the first point of the grid (see `Grid.start`) to its last, without gradients.

    `on_step(step, total, x0)` follows each step, counted from 0. Raises FloatingPointError if the state stops
    being finite, at the end only, so that no step waits for the device.
    """
    total = len(grid.points) - 1
    broken = torch.full((), total, device=x.device)  # the first step whose state is not finite
    for state in solver(denoise, x, grid, noise):
        x = state.x
        broken = torch.where(x.isfinite().all(), broken, broken.clamp(max=state.step))
        if on_step is not None:
            on_step(state.step, total, state.x0)
    if (step := int(broken)) < total:
        raise FloatingPointError(_diagnosis(grid, step))
    return x


def _diagnosis(grid: Grid, step: int) -> str:
    point = grid.points[step]
    cause = (
        "alpha is 0 there, by which eps-prediction divides, so use prediction v or flow"
        if point.alpha == 0
        else "the network most likely overflowed, so try float32 or less guidance"
    )
    return (
        f"sampling stopped being finite at step {step + 1} of {len(grid.points) - 1} "
        f"(time {point.time:g}, sigma {point.sigma:.4g}): {cause}"
    )
