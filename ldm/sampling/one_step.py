"""Single-step solvers, which use no history; each step leads from point t to point s."""

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
    """Samples from q(x_s | x_t, x0), whose variance is beta-tilde (Ho et al. 2020, equation 7).

    variance=beta uses the variance of q(x_t | x_s), the other choice of section 3.2.
    """
    check_choice("variance", variance, "posterior", "beta")
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        snr_ratio = contraction(t, s) ** 2
        x = blend((t.alpha * s.sigma**2) / (s.alpha * t.sigma**2), x, s.alpha * (1 - snr_ratio), x0)
        if s.sigma > 0:
            x.add_(noise(step), alpha=(s if variance == "posterior" else t).sigma * sqrt(1 - snr_ratio))
        yield State(step, x, x0)


def ddim(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, eta: float = 0.0) -> Iterator[State]:
    """DDIM (Song et al. 2021, equation 12); eta = 0 adds no noise, eta = 1 is ddpm."""
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

    This is Euler on x / alpha against sigma / alpha (Karras et al. 2022), but also valid where alpha is 0; on the
    flow schedule it is Euler in sigma.
    """
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        x = _euler(x, t, s, x0)
        yield State(step, x, x0)


def euler_a(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, eta: float = 1.0) -> Iterator[State]:
    """Euler ancestral of k-diffusion: Euler to less noise than the next point has, then noise is added back."""
    check_range("eta", eta, 0.0, 1.0)
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        down, std = ancestral(t, s, eta)
        x = _euler(x, t, down, x0)
        if std > 0:
            x.add_(noise(step), alpha=std)
        yield State(step, x, x0)


def heun(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, path: str = "edm") -> Iterator[State]:
    """Heun with two calls per step, and one for the step to the clean end (Karras et al. 2022, algorithm 1).

    `path` selects the variables in which slopes are averaged: edm, x / alpha against sigma / alpha as in the paper,
    where a step from pure noise is an Euler step; or flow, those of `euler`, which are valid there too.
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

    s_tmin and s_tmax bound sigma / alpha. The defaults are the paper's for ImageNet, except for s_noise, which is 1.003
    there to compensate errors of the network. The noise level is never raised above that of the schedule's end.
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
    """DPM-Solver++(2S) with r = 1/2: two calls per step, one to the clean end (Lu et al. 2022, algorithm 1).

    With eta = 1 it is k-diffusion's DPM++ 2S ancestral. With `on_grid` (and eta = 0) every second point of the grid
    is the midpoint of a step, so that there is one call per point, as in diffusers. A step from pure noise has no
    midpoint in log-SNR and is of first order.
    """
    check_range("eta", eta, 0.0, 0.0 if on_grid else 1.0)
    return _midpoints_on_grid(denoise, x, grid) if on_grid else _midpoints_off_grid(denoise, x, grid, noise, eta)


def _midpoints_off_grid(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, eta: float) -> Iterator[State]:
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


def _midpoints_on_grid(denoise: Denoise, x: Tensor, grid: Grid) -> Iterator[State]:
    """Alternates between steps to a midpoint and steps past it; the last step is of first order."""
    start: tuple[Tensor, Point, Tensor] | None = None
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        if start is None:
            has_second_half = t.alpha > 0 and step + 2 < len(grid.points) - 1
            start, x = (x, t, x0) if has_second_half else None, first_order(x, t, s, x0)
        else:
            x_start, first, x0_start = start
            r = (t.log_snr - first.log_snr) / (s.log_snr - first.log_snr)
            start, x = None, first_order(x_start, first, s, x0_start + (x0 - x0_start) / (2 * r))
        yield State(step, x, x0)


def dpmpp_sde(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, eta: float = 1.0) -> Iterator[State]:
    """DPM++ SDE of k-diffusion with r = 1/2: `dpmpp_2s` with noise also in the step to the midpoint.

    The noise of the full step includes that of its first half, as the increments of a Brownian motion in sigma / alpha.
    """
    check_range("eta", eta, 0.0, 1.0)
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        down, std = ancestral(t, s, eta)
        if t.alpha == 0 or s.sigma == 0:
            total = noise(2 * step) if std > 0 else None
        else:
            middle = grid.at_log_snr((t.log_snr + s.log_snr) / 2)
            first = noise(2 * step)
            fraction = (t.ratio - middle.ratio) / (t.ratio - s.ratio)
            total = blend(sqrt(fraction), first, sqrt(1 - fraction), noise(2 * step + 1))
            half_down, half_std = ancestral(t, middle, eta)
            x0 = denoise(first_order(x, t, half_down, x0).add_(first, alpha=half_std), middle.time)
        x = first_order(x, t, down, x0)
        if total is not None:
            x.add_(total, alpha=std)
        yield State(step, x, x0)


def _euler(x: Tensor, t: Point, s: Point, x0: Tensor) -> Tensor:
    ratio = s.tau / t.tau
    return blend(s.scale * ratio / t.scale, x, s.scale * (1 - ratio), x0)


def _heun(denoise: Denoise, x: Tensor, t: Point, s: Point, x0: Tensor, path: str) -> Tensor:
    """Returns the Euler step corrected by half of the change of the slope along it."""
    ahead = _euler(x, t, s, x0)
    if s.sigma == 0 or (path == "edm" and t.alpha == 0):
        return ahead
    x0_ahead = denoise(ahead, s.time)
    change = eps_of(ahead, x0_ahead, s).sub_(eps_of(x, x0, t))
    if path == "edm":
        return torch.add(ahead, change, alpha=s.alpha * (s.ratio - t.ratio) / 2)
    return torch.add(ahead, change.sub_(x0_ahead).add_(x0), alpha=s.scale * (s.tau - t.tau) / 2)
