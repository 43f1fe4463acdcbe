"""Building blocks of solver steps, each of which leads from point t to point s."""

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
FEW_STEPS = 15  # below this number of steps, the code of DPM-Solver++ lowers the order towards the end


def blend(a: float, x: Tensor, b: float, y: Tensor) -> Tensor:
    """Returns a·x + b·y. Allocates one tensor instead of three, which take longer than the sum for small latents."""
    return (a * x).add_(y, alpha=b)


def eps_of(x: Tensor, x0: Tensor, t: Point) -> Tensor:
    """Returns eps of x = alpha·x0 + sigma·eps."""
    return blend(1 / t.sigma, x, -t.alpha / t.sigma, x0)


def first_order(x: Tensor, t: Point, s: Point, x0: Tensor) -> Tensor:
    """Returns the DDIM step, exact for a constant x0; valid from pure noise and to the clean end."""
    ratio = s.sigma / t.sigma
    return blend(ratio, x, s.alpha - ratio * t.alpha, x0)


def contraction(t: Point, s: Point) -> float:
    """Returns sqrt(SNR(t) / SNR(s)) = exp(-h), h the step in half log-SNR; 0 from pure noise and to the clean end."""
    return t.alpha * s.sigma / (s.alpha * t.sigma)


def ancestral(t: Point, s: Point, eta: float) -> tuple[Point, float]:
    """Returns the target of the deterministic step, and the std of the noise to add after it to reach s.

    At eta = 1 its variance is that of the posterior, beta-tilde (Song et al. 2021, equation 16).
    """
    std = eta * s.sigma * math.sqrt(1 - contraction(t, s) ** 2)
    return Point(math.nan, s.alpha, math.sqrt(s.sigma**2 - std**2)), std


def order_at(step: int, grid: Grid, order: int, lower_order_final: bool) -> int:
    """Returns the order of a multistep step: 1 to the clean end; with `lower_order_final` at most the steps left."""
    total = len(grid.points) - 1
    if grid.points[step + 1].sigma == 0:
        return 1
    return min(order, total - step) if lower_order_final else order


def data_weights(nodes: list[float], h: float, rule: str = "exact", curvature: str = "exact") -> list[float]:
    """Returns weights of x0 at `nodes` u in half log-SNR, scaled so that the step leads from u = 0 to u = 1.

    The weighted sum of x0 is the integral of the polynomial through all nodes times h·exp(-h·(1 - u)) over the step.
    With two nodes the rules bh1 and bh2 (Zhao et al. 2023, section 3.4) replace the moment of u by h/2 and
    (1 - exp(-h))/2; with three nodes `curvature` replaces the moment of u²/2.
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
    """Returns weights of eps at the nodes: integrals of the Lagrange polynomials over sigma/alpha from t to s.

    The polynomials are in `variable`: ratio (sigma/alpha), log_ratio (its logarithm) or time.
    """
    a, b = t.ratio, s.ratio
    if variable == "ratio":
        ratios, weights = _quadrature(a, b)
        return _integrals([node.ratio for node in nodes], ratios, weights)
    logs, weights = _quadrature(math.log(a), math.log(b))
    weights = weights * np.exp(logs)
    if variable == "log_ratio":
        return _integrals([math.log(node.ratio) for node in nodes], logs, weights)
    times = grid.schedule.time(torch.from_numpy(-2 * logs)).numpy()
    return _integrals([node.time for node in nodes], times, weights)


@lru_cache(maxsize=1)
def _gauss() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.polynomial.legendre.leggauss(24)


def _quadrature(a: float, b: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the nodes and the signed weights of Gauss-Legendre quadrature from a to b."""
    nodes, weights = _gauss()
    return (a + b) / 2 + (b - a) / 2 * nodes, (b - a) / 2 * weights


def _integrals(nodes: list[float], at: NDArray[np.float64], weights: NDArray[np.float64]) -> list[float]:
    """Returns the integrals of the Lagrange polynomials, which are 1 at one node and 0 at the others."""
    integrals = []
    for node in nodes:
        factors = [(at - other) / (node - other) for other in nodes if other != node]
        integrals.append(float(np.prod(factors, axis=0) @ weights) if factors else float(weights.sum()))
    return integrals
