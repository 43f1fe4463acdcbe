"""Solvers that remember nothing from one step to the next: each goes from point t to point s."""

from collections.abc import Iterator
from itertools import pairwise
from math import log, sqrt

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.grid import Grid, Noise, Point, State
from ldm.sampling.options import check_choice, check_range
from ldm.sampling.step import ancestral, blend, contraction, eps_of, first_order


def ddpm(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, variance: str = "posterior") -> Iterator[State]:
    """Draws from q(x_s | x_t, x0), of variance beta-tilde (Ho et al. 2020, equation 7).

    `variance` may be beta instead, that of q(x_t | x_s), the other choice of their section 3.2.
    """
    check_choice("variance", variance, "posterior", "beta")
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        kept = contraction(t, s) ** 2
        x = blend((t.alpha * s.sigma**2) / (s.alpha * t.sigma**2), x, s.alpha * (1 - kept), x0)
        if s.sigma > 0:
            x.add_(noise(step), alpha=(s if variance == "posterior" else t).sigma * sqrt(1 - kept))
        yield State(step, x, x0)


def ddim(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, eta: float = 0.0) -> Iterator[State]:
    """Song et al. 2021, equation 12; eta = 0 takes no noise, eta = 1 is ddpm."""
    check_range("eta", eta, 0.0, 1.0)
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        down, std = ancestral(t, s, eta)
        x = first_order(x, t, down, x0)
        if std > 0:
            x.add_(noise(step), alpha=std)
        yield State(step, x, x0)


def euler(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
    """Euler on y = x / (alpha + sigma) against tau: dy/dtau = eps - x0 = (y - x0) / tau.

    This is Euler on x / alpha against sigma / alpha (Karras et al. 2022), but holds where alpha is 0 too;
    on the flow schedule it is plain Euler in sigma.
    """
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        x = _euler(x, t, s, x0)
        yield State(step, x, x0)


def euler_a(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, eta: float = 1.0) -> Iterator[State]:
    """Euler past the next point, then noise back up to it (k-diffusion's Euler ancestral)."""
    check_range("eta", eta, 0.0, 1.0)
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        down, std = ancestral(t, s, eta)
        x = _euler(x, t, down, x0)
        if std > 0:
            x.add_(noise(step), alpha=std)
        yield State(step, x, x0)


def heun(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, path: str = "edm") -> Iterator[State]:
    """Heun, two calls a step, one to the clean end (Karras et al. 2022, algorithm 1).

    `path` says in which variables a slope is averaged: edm, x / alpha against sigma / alpha as in the paper, where
    a step from pure noise is Euler's; or flow, those of `euler`, which hold there too.
    """
    check_choice("path", path, "edm", "flow")
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        x = _heun(denoise, x, t, s, x0, path)
        yield State(step, x, x0)


def edm(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.0,
) -> Iterator[State]:
    """Heun with churn: noise is added before each step (Karras et al. 2022, algorithm 2).

    s_tmin and s_tmax bound sigma / alpha. The defaults are theirs for ImageNet, but s_noise, 1.003 there, which
    makes up for a network's errors. Noise is never raised above the schedule's own.
    """
    check_range("s_churn", s_churn, 0.0)
    check_range("s_tmax", s_tmax, 0.0)
    check_range("s_tmin", s_tmin, 0.0, s_tmax)
    check_range("s_noise", s_noise, 0.0)
    churn = min(s_churn / (len(grid.points) - 1), sqrt(2) - 1)
    for step, (t, s) in enumerate(pairwise(grid.points)):
        if churn > 0 and s_tmin <= t.ratio <= s_tmax and t.alpha > 0:
            hat = grid.at_log_snr(t.log_snr - 2 * log(1 + churn))
            std = s_noise * hat.alpha * sqrt(max(hat.ratio**2 - t.ratio**2, 0))
            x, t = blend(hat.alpha / t.alpha, x, std, noise(step)), hat
        x0 = denoise(x, t.time)
        x = _heun(denoise, x, t, s, x0, "edm")
        yield State(step, x, x0)


def dpmpp_2s(
    denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, eta: float = 0.0, on_grid: bool = False
) -> Iterator[State]:
    """DPM-Solver++(2S) with r = 1/2, two calls a step, one to the clean end (Lu et al. 2022, algorithm 1).

    With eta = 1 it is k-diffusion's DPM++ 2S ancestral. With `on_grid` (and eta = 0) every second point of the grid
    stands for a middle, so that there is one call a step, as in diffusers. A step from pure noise, whose middle in
    log-SNR lies nowhere, is of first order.
    """
    check_range("eta", eta, 0.0, 0.0 if on_grid else 1.0)
    return _middles_on_grid(denoise, x, grid) if on_grid else _middles_between(denoise, x, grid, noise, eta)


def _middles_between(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, eta: float) -> Iterator[State]:
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        down, std = ancestral(t, s, eta)
        if t.alpha > 0 and down.sigma > 0:
            middle = grid.at_log_snr((t.log_snr + down.log_snr) / 2)
            x0 = denoise(first_order(x, t, middle, x0), middle.time)
        x = first_order(x, t, down, x0)
        if std > 0:
            x.add_(noise(step), alpha=std)
        yield State(step, x, x0)


def _middles_on_grid(denoise: Denoise, x: Tensor, grid: Grid) -> Iterator[State]:
    """Steps to a middle and past it take turns; the last one is of first order."""
    start: tuple[Tensor, Point, Tensor] | None = None
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        if start is None:
            whole = t.alpha > 0 and step + 2 < len(grid.points) - 1
            start, x = (x, t, x0) if whole else None, first_order(x, t, s, x0)
        else:
            x_start, first, x0_start = start
            r = (t.log_snr - first.log_snr) / (s.log_snr - first.log_snr)
            start, x = None, first_order(x_start, first, s, x0_start + (x0 - x0_start) / (2 * r))
        yield State(step, x, x0)


def dpmpp_sde(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, eta: float = 1.0) -> Iterator[State]:
    """DPM++ SDE of k-diffusion with r = 1/2: `dpmpp_2s` with noise on the way to the middle too.

    The noise of the whole step holds that of its first part, in the shares of a Brownian motion in sigma / alpha.
    """
    check_range("eta", eta, 0.0, 1.0)
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        down, std = ancestral(t, s, eta)
        if t.alpha == 0 or s.sigma == 0:
            whole = noise(2 * step) if std > 0 else None
        else:
            middle = grid.at_log_snr((t.log_snr + s.log_snr) / 2)
            first = noise(2 * step)
            share = (t.ratio - middle.ratio) / (t.ratio - s.ratio)
            whole = blend(sqrt(share), first, sqrt(1 - share), noise(2 * step + 1))
            half_down, half_std = ancestral(t, middle, eta)
            x0 = denoise(first_order(x, t, half_down, x0).add_(first, alpha=half_std), middle.time)
        x = first_order(x, t, down, x0)
        if whole is not None:
            x.add_(whole, alpha=std)
        yield State(step, x, x0)


def _euler(x: Tensor, t: Point, s: Point, x0: Tensor) -> Tensor:
    ratio = s.tau / t.tau
    return blend(s.scale * ratio / t.scale, x, s.scale * (1 - ratio), x0)


def _heun(denoise: Denoise, x: Tensor, t: Point, s: Point, x0: Tensor, path: str) -> Tensor:
    """Half of what the slope changes along Euler's step is added to it."""
    ahead = _euler(x, t, s, x0)
    if s.sigma == 0 or (path == "edm" and t.alpha == 0):
        return ahead
    x0_ahead = denoise(ahead, s.time)
    change = eps_of(ahead, x0_ahead, s).sub_(eps_of(x, x0, t))
    if path == "edm":
        return torch.add(ahead, change, alpha=s.alpha * (s.ratio - t.ratio) / 2)
    return torch.add(ahead, change.sub_(x0_ahead).add_(x0), alpha=s.scale * (s.tau - t.tau) / 2)
