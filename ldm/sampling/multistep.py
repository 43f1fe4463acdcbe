"""Multistep solvers that extrapolate earlier estimates of x0 in log-SNR, with one call per step.

A step from pure noise is infinitely long in log-SNR, so it is of first order and later steps do not use its x0.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import inf, log, sqrt

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.grid import Grid, Noise, Point, State
from ldm.sampling.options import check_choice, check_range
from ldm.sampling.step import CURVATURES, FEW_STEPS, contraction, data_weights, first_order, order_at

RULES = {"midpoint": "bh2", "heun": "exact"}  # the equivalent rules in the notation of Zhao et al.
History = list[tuple[Point, Tensor]]  # points and the estimates of x0 there, the latest first


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    rule: str = "midpoint",
    lower_order_final: bool = True,
) -> Iterator[State]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); rule=heun integrates the line through two x0 exactly.

    With `lower_order_final` and fewer than 15 steps the last step is of first order, as in the authors' code.
    """
    return _dpmpp(denoise, x, grid, noise, 2, 0.0, rule, "exact", lower_order_final)


def dpmpp_3m(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    rule: str = "heun",
    curvature: str = "exact",
    lower_order_final: bool = True,
) -> Iterator[State]:
    """DPM-Solver++(3M): integrates the parabola through three x0 exactly (Lu et al. 2022); `rule` applies to two.

    curvature=half halves the parabola's second difference, as the authors' code, k-diffusion and diffusers do; this
    loses the third order.
    """
    return _dpmpp(denoise, x, grid, noise, 3, 0.0, rule, curvature, lower_order_final)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    eta: float = 1.0,
    rule: str = "midpoint",
    lower_order_final: bool = True,
) -> Iterator[State]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix); eta scales the noise as in k-diffusion, 0 is dpmpp_2m."""
    return _dpmpp(denoise, x, grid, noise, 2, eta, rule, "exact", lower_order_final)


def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    eta: float = 1.0,
    rule: str = "heun",
    curvature: str = "half",
    lower_order_final: bool = True,
) -> Iterator[State]:
    """DPM++ 3M SDE of k-diffusion; eta = 0 is dpmpp_3m with curvature=half.

    `lower_order_final` lowers the order in the last two steps of any number of steps, not only of fewer than 15: the
    last steps are the longest in log-SNR, where extrapolated parabolas amplify the noise that was added before.
    curvature=exact, which integrates parabolas exactly, and curvature=diffusers, which differs from half by a sign,
    amplify it more.
    """
    return _dpmpp(denoise, x, grid, noise, 3, eta, rule, curvature, lower_order_final, few_steps=None)


def unipc(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
) -> Iterator[State]:
    """UniPC on x0 (Zhao et al. 2023, algorithms 5 and 6): each new x0 first corrects the step that led to it.

    Without the corrector it is UniP. With three estimates of x0, bh1 and bh2 are the same.
    """
    check_range("order", order, 1, 3)
    check_choice("variant", variant, "bh1", "bh2")
    before: tuple[Tensor, Point, History] | None = None
    history: History = []
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        if corrector and before is not None:
            x = _step(before[0], before[1], t, [(t, x0), *before[2]], variant)
        history = [(t, x0), *history[: order - 1]]
        if t.alpha == 0:
            before, history, x = None, [], first_order(x, t, s, x0)
        else:
            used = history[: order_at(step, grid, order, lower_order_final)]
            before = (x, t, used)
            x = _step(x, t, s, used, variant)
        yield State(step, x, x0)


def _dpmpp(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    order: int,
    eta: float,
    rule: str,
    curvature: str,
    lower_order_final: bool,
    few_steps: int | None = FEW_STEPS,
) -> Iterator[State]:
    """`lower_order_final` applies to fewer steps than `few_steps`, or to any number if that is None."""
    check_range("eta", eta, 0.0, 1.0)
    check_choice("rule", rule, *RULES)
    check_choice("curvature", curvature, *CURVATURES)
    lower_order_final = lower_order_final and (few_steps is None or len(grid.points) - 1 < few_steps)
    history: History = []
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        history = [(t, x0), *history[: order - 1]]
        used = history[: order_at(step, grid, order, lower_order_final)]
        x = _step(x, t, s, used, RULES[rule], eta, curvature)
        if eta > 0 and s.sigma > 0:
            x.add_(noise(step), alpha=s.sigma * sqrt(1 - contraction(t, s) ** (2 * eta)))
        if t.alpha == 0:
            history = []
        yield State(step, x, x0)


def _step(
    x: Tensor, t: Point, s: Point, known: History, rule: str, eta: float = 0.0, curvature: str = "exact"
) -> Tensor:
    """Returns sigma_s/sigma_t·exp(-eta·h)·x plus the integral of the polynomial through the known estimates of x0."""
    decay = contraction(t, s)
    h = (1 + eta) * -log(decay) if decay > 0 else inf
    length = s.log_snr - t.log_snr
    if len(known) == 1:
        weights = [1 - decay ** (1 + eta)]
    else:
        weights = data_weights([(point.log_snr - t.log_snr) / length for point, _ in known], h, rule, curvature)
    x = s.sigma / t.sigma * decay**eta * x
    for weight, (_, x0) in zip(weights, known, strict=True):
        x.add_(x0, alpha=s.alpha * weight)
    return x
