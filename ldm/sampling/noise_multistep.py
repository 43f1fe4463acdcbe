"""Multistep solvers that extrapolate the noise eps of earlier states, with one call per step after the first ones.

In pure noise the state does not depend on x0, so a step from there is of first order, and later steps do not use it.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.sampling.grid import Grid, Noise, Point, State
from ldm.sampling.options import check_choice, check_range
from ldm.sampling.step import FEW_STEPS, eps_of, first_order, noise_weights, order_at

History = list[tuple[Point, Tensor]]  # points and sigma·eps there, the latest first
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def lms(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, order: int = 4) -> Iterator[State]:
    """Linear multistep on x / alpha against sigma / alpha (k-diffusion's LMS): Adams-Bashforth for uneven steps."""
    check_range("order", order, 1, 4)
    return _adams_bashforth(denoise, x, grid, order, "ratio", lower_order_final=False)


def deis(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    order: int = 3,
    variable: str = "time",
    lower_order_final: bool = True,
) -> Iterator[State]:
    """DEIS (Zhang & Chen 2023, proposition 3): eps is a polynomial with `order` coefficients in `variable`.

    The variable is time (the paper's tAB-DEIS), ratio (sigma / alpha, rhoAB-DEIS) or log_ratio (diffusers).
    """
    check_range("order", order, 1, 4)
    check_choice("variable", variable, "time", "ratio", "log_ratio")
    return _adams_bashforth(denoise, x, grid, order, variable, lower_order_final and len(grid.points) - 1 < FEW_STEPS)


def pndm(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, prk: bool = True) -> Iterator[State]:
    """PNDM (Liu et al. 2022, algorithm 2): a DDIM step with eps extrapolated as if all steps were equal.

    The first three steps are Runge-Kutta steps of four calls each. With prk=False only the first step is special, with
    two calls: the PLMS of Stable Diffusion, which diffusers implements as skip_prk_steps.
    """
    history: History = []
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        if t.alpha > 0:
            history = [(t, torch.sub(x, x0, alpha=t.alpha)), *history[:3]]
        if t.alpha == 0:
            x = first_order(x, t, s, x0)
        elif s.sigma > 0 and prk and len(history) < 4:
            change = _runge_kutta(denoise, x, x0, t, grid.at((t.time + s.time) / 2), s)
            x = first_order(x, t, s, x0).add_(change, alpha=_eps_coefficient(t, s))
        elif s.sigma > 0 and len(history) == 1:
            x = first_order(x, t, s, x0).add_(_heun(denoise, x, x0, t, s), alpha=_eps_coefficient(t, s))
        else:
            x = _extrapolated(x0, s, _eps_coefficient(t, s), ADAMS_BASHFORTH[len(history) - 1], history)
        yield State(step, x, x0)


def _adams_bashforth(
    denoise: Denoise, x: Tensor, grid: Grid, order: int, variable: str, lower_order_final: bool
) -> Iterator[State]:
    history: History = []
    for step, (t, s) in enumerate(pairwise(grid.points)):
        x0 = denoise(x, t.time)
        if t.alpha > 0 and (s.sigma > 0 or variable == "ratio"):
            history = [(t, torch.sub(x, x0, alpha=t.alpha)), *history[: order - 1]]
            used = history if s.sigma == 0 else history[: order_at(step, grid, order, lower_order_final)]
            x = _extrapolated(x0, s, s.alpha, noise_weights(variable, grid, t, s, [point for point, _ in used]), used)
        else:
            x = first_order(x, t, s, x0)
        yield State(step, x, x0)


def _eps_coefficient(t: Point, s: Point) -> float:
    """Returns the derivative of the end of a DDIM step by eps (Liu et al. 2022, equation 11)."""
    return s.sigma - s.alpha * t.ratio


def _extrapolated(x0: Tensor, s: Point, factor: float, weights: Sequence[float], history: History) -> Tensor:
    """Returns the DDIM step plus factor·(weighted sum of eps in the history - sum of weights · latest eps)."""
    amounts = [factor * weight for weight in weights]
    amounts[0] += s.sigma - sum(amounts)
    ahead = s.alpha * x0
    for amount, (point, noise) in zip(amounts, history, strict=True):
        ahead.add_(noise, alpha=amount / point.sigma)
    return ahead


def _heun(denoise: Denoise, x: Tensor, x0: Tensor, t: Point, s: Point) -> Tensor:
    """Returns the mean of eps at both ends of the step, minus eps at its start; makes one more call."""
    ahead = first_order(x, t, s, x0)
    return eps_of(ahead, denoise(ahead, s.time), s).sub_(eps_of(x, x0, t)).div_(2)


def _runge_kutta(denoise: Denoise, x: Tensor, x0: Tensor, t: Point, middle: Point, s: Point) -> Tensor:
    """Returns the Runge-Kutta mean of eps over the step, minus eps at its start; makes three more calls."""
    eps = eps_of(x, x0, t)

    def eps_change(point: Point, change: Tensor) -> Tensor:
        state = first_order(x, t, point, x0).add_(change, alpha=_eps_coefficient(t, point))
        return eps_of(state, denoise(state, point.time), point).sub_(eps)

    second = eps_change(middle, torch.zeros_like(eps))
    third = eps_change(middle, second)
    fourth = eps_change(s, third)
    return (second + third).mul_(2).add_(fourth).div_(6)
