"""Solvers that remember nothing from one step to the next: each goes from point t to point s."""

from collections.abc import Iterator
from itertools import pairwise
from math import sqrt

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.grid import Grid, Noise, Point, State


def ddpm(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
    """Draws from the posterior q(x_s | x_t, x0), of variance beta-tilde (Ho et al. 2020, equation 7)."""
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        kept = _snr_ratio(t, s)
        x = (t.alpha * s.sigma**2) / (s.alpha * t.sigma**2) * x + s.alpha * (1 - kept) * x0
        if s.sigma > 0:
            x = x + s.sigma * sqrt(1 - kept) * noise(step)
        yield State(step, x, x0)


def ddim(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, eta: float = 0.0) -> Iterator[State]:
    """Song et al. 2021, equation 12; eta = 0 takes no noise, eta = 1 is ddpm."""
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        std = eta * s.sigma * sqrt(1 - _snr_ratio(t, s))
        eps = sqrt(s.sigma**2 - std**2) / t.sigma  # times x - alpha·x0
        x = eps * x + (s.alpha - eps * t.alpha) * x0
        if std > 0:
            x = x + std * noise(step)
        yield State(step, x, x0)


def euler(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
    """Euler on y = x / (alpha + sigma) against tau: dy/dtau = eps - x0 = (y - x0) / tau.

    This is Euler on x / alpha against sigma / alpha (Karras et al. 2022), but holds where alpha is 0 too;
    on the flow schedule it is plain Euler in sigma.
    """
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        x = s.scale * (x0 + s.tau / t.tau * (x / t.scale - x0))
        yield State(step, x, x0)


def heun(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
    """Heun in the variables of `euler`, two calls a step; the step to the clean end is Euler's.

    As accurate as Karras et al.'s Heun on x / alpha, though not the same at finite steps.
    """
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        y = x / t.scale
        y_s = x0 + s.tau / t.tau * (y - x0)
        if s.sigma > 0:
            slope_t = (y - x0) / t.tau
            slope_s = (y_s - denoise(s.scale * y_s, s.time)) / s.tau
            y_s = y + (s.tau - t.tau) / 2 * (slope_t + slope_s)
        x = s.scale * y_s
        yield State(step, x, x0)


def _snr_ratio(t: Point, s: Point) -> float:
    """SNR(t) / SNR(s), in [0, 1]; beta-tilde is sigma_s² times what is missing from 1."""
    return (t.alpha * s.sigma / (s.alpha * t.sigma)) ** 2
