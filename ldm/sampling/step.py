"""What the steps of several solvers are made of. A step goes from point t to point s."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.sampling.grid import Grid, Point

CURVATURES: dict[str, Callable[[float], float]] = {
    "exact": lambda moment: moment,
    "half": lambda moment: moment / 2,
    "diffusers": lambda moment: (moment - 1) / 2,
}
BELOW = 15  # steps, under which the authors of DPM-Solver++ lower the order towards the end


def blend(a: float, x: Tensor, b: float, y: Tensor) -> Tensor:
    """a·x + b·y, as one new tensor instead of three, which at the size of latents take longer than the sum."""
    return (a * x).add_(y, alpha=b)


def eps_of(x: Tensor, x0: Tensor, t: Point) -> Tensor:
    """The noise in x, of which x0 is the data."""
    return blend(1 / t.sigma, x, -t.alpha / t.sigma, x0)


def first_order(x: Tensor, t: Point, s: Point, x0: Tensor) -> Tensor:
    """The exact step if x0 stays what it is: that of DDIM. It holds at pure noise and at the clean end."""
    ratio = s.sigma / t.sigma
    return blend(ratio, x, s.alpha - ratio * t.alpha, x0)


def contraction(t: Point, s: Point) -> float:
    """sqrt(SNR(t) / SNR(s)) = exp(-h), h the step in half log-SNR: 0 from pure noise and to the clean end."""
    return t.alpha * s.sigma / (s.alpha * t.sigma)


def ancestral(t: Point, s: Point, eta: float) -> tuple[Point, float]:
    """The point to descend to without noise, and the standard deviation of the noise that leads on to s.

    At eta = 1 that is the posterior's, beta-tilde (Song et al. 2021, equation 16).
    """
    std = eta * s.sigma * math.sqrt(1 - contraction(t, s) ** 2)
    return Point(math.nan, s.alpha, math.sqrt(s.sigma**2 - std**2)), std


def order_at(step: int, grid: Grid, order: int, lower_order_final: bool) -> int:
    """The order of a multistep step: 1 to the clean end, and at most the number of steps left where asked."""
    total = len(grid.points) - 1
    if grid.points[step + 1].sigma == 0:
        return 1
    return min(order, total - step) if lower_order_final else order


def data_weights(nodes: list[float], h: float, rule: str = "exact", curvature: str = "exact") -> list[float]:
    """Weights of x0 at nodes in half log-SNR, in units of the step from 0 to 1, so that their sum is the mean
    of x0 under the density h·exp(-h(1 - u)) on the step, times 1 - exp(-h).

    With `exact` so for the polynomial through all nodes. The rules bh1 and bh2 (Zhao et al. 2023, section 3.4)
    put h/2 and (1 - exp(-h))/2 in place of a line's moment, where there are two nodes. `curvature` says what to put in
    place of a parabola's, where there are three.
    """
    moments = [-math.expm1(-h)]  # of u^k / k!
    for k in range(1, len(nodes)):
        moments.append(1 / math.factorial(k) - moments[-1] / h)
    if len(nodes) == 2 and rule != "exact":
        moments[1] = (h if rule == "bh1" else moments[0]) / 2
    if len(nodes) == 3:
        moments[2] = CURVATURES[curvature](moments[2])
    powers = [[u**k / math.factorial(k) for u in nodes] for k in range(len(nodes))]
    return np.linalg.solve(np.array(powers), np.array(moments)).tolist()


def noise_weights(variable: str, grid: Grid, t: Point, s: Point, nodes: list[Point]) -> list[float]:
    """Weights of eps at the nodes: the integrals over sigma/alpha, from t to s, of the Lagrange polynomials in
    `variable`: the ratio sigma/alpha, its logarithm log_ratio, or the time."""
    a, b = t.ratio, s.ratio
    if variable == "ratio":
        ratios, lengths = _quadrature(a, b)
        return _integrals([node.ratio for node in nodes], ratios, lengths)
    logs, lengths = _quadrature(math.log(a), math.log(b))
    lengths = lengths * np.exp(logs)
    if variable == "log_ratio":
        return _integrals([math.log(node.ratio) for node in nodes], logs, lengths)
    times = grid.schedule.time(torch.from_numpy(-2 * logs)).numpy()
    return _integrals([node.time for node in nodes], times, lengths)


@lru_cache(maxsize=1)
def _gauss() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.polynomial.legendre.leggauss(24)


def _quadrature(a: float, b: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points from a to b and the signed lengths that they stand for."""
    at, weight = _gauss()
    return (a + b) / 2 + (b - a) / 2 * at, (b - a) / 2 * weight


def _integrals(nodes: list[float], at: NDArray[np.float64], lengths: NDArray[np.float64]) -> list[float]:
    """Of the polynomials that are 1 at one node and 0 at the others."""
    total = []
    for node in nodes:
        factors = [(at - other) / (node - other) for other in nodes if other != node]
        total.append(float(np.prod(factors, axis=0) @ lengths) if factors else float(lengths.sum()))
    return total
