"""Solvers that reuse the denoiser's earlier answers, one call a step."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.grid import Grid, Noise, State


def dpmpp_2m(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, lower_order_final: bool = True) -> Iterator[State]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    A step from pure noise is infinitely long in log-SNR, so the step after it extrapolates x0 by a flat line;
    the step to the clean end is always of first order.
    """
    last = len(grid.points) - 2
    previous = None  # x0 of the step before, and its length in log-SNR
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        h = s.log_snr - t.log_snr
        d = x0
        if previous is not None and s.sigma > 0 and not (lower_order_final and step == last):
            x0_before, h_before = previous
            d = x0 + h / (2 * h_before) * (x0 - x0_before)
        ratio = s.sigma / t.sigma
        x = ratio * x + (s.alpha - ratio * t.alpha) * d
        previous = x0, h
        yield State(step, x, x0)
