"""Gaussian mixtures, whose optimal denoiser and therefore sampling paths are known exactly."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule

CLEAN_LOG_RATIO = -16.0  # ln(sigma / alpha) at which the reference stops and takes x0


@dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussians with weights (k,), means (k, d) and standard deviations (k,), all float64."""

    shares: Tensor
    means: Tensor
    stds: Tensor

    def x0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x0 | x_t] for x (n, d)."""
        variance = alpha**2 * self.stds**2 + sigma**2  # (k,)
        offset = x[:, None] - alpha * self.means  # (n, k, d)
        logits = self.shares.log() - offset.square().sum(-1) / (2 * variance) - x.shape[1] / 2 * variance.log()
        each = self.means + (alpha * self.stds**2 / variance)[:, None] * offset  # (n, k, d)
        return (logits.softmax(1)[..., None] * each).sum(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Returns n samples (n, d)."""
        which = torch.multinomial(self.shares, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[which] + self.stds[which, None] * noise


@dataclass(frozen=True)
class Problem:
    """A sampling problem: `data`, or guidance from `data` to `towards` by a scale."""

    name: str
    data: Mixture
    towards: Mixture | None = None
    guidance: float = 1.0

    def x0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        x0 = self.data.x0(x, alpha, sigma)
        if self.towards is None:
            return x0
        return x0 + self.guidance * (self.towards.x0(x, alpha, sigma) - x0)

    def denoiser(self, schedule: Schedule) -> Denoise:
        def denoise(x: Tensor, t: float) -> Tensor:
            return self.x0(x, *_levels(schedule, t))  # type: ignore[arg-type]  # a schedule hashes by identity

        return denoise

    def exact(self, eps: Tensor, log_ratio: float, end: float | None = None) -> Tensor:
        """Returns the end of the path that starts at y = x / sigma = eps (n, d), where ln(sigma / alpha) = `log_ratio`.

        The end is x0, or x / sigma at ln(sigma / alpha) = `end`. With l = -ln(sigma / alpha) the path of y = x / sigma
        is dy/dl = exp(l)·x0(y); it is solved to 1e-12.
        """
        shape = eps.shape

        def slope(level: float, y: NDArray[np.float64]) -> NDArray[np.float64]:
            state = torch.from_numpy(y).view(shape)
            ratio = math.exp(-level)
            return math.exp(level) * self.x0(ratio * state, 1.0, ratio).flatten().numpy()

        stop = CLEAN_LOG_RATIO if end is None else end
        span = -log_ratio, -stop
        solution = solve_ivp(slope, span, eps.flatten().numpy(), "DOP853", rtol=1e-12, atol=1e-12, t_eval=span[1:])
        y = torch.from_numpy(solution.y[:, -1].copy()).view(shape)
        return y if end is not None else self.x0(math.exp(stop) * y, 1.0, math.exp(stop))


@lru_cache(maxsize=100_000)
def _levels(schedule: Schedule, t: float) -> tuple[float, float]:
    time = torch.tensor(t, dtype=torch.float64)
    return float(schedule.alpha(time)), float(schedule.sigma(time))


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _ring(count: int, radius: float, turn: float = 0.0) -> Tensor:
    angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count) + turn
    return radius * torch.stack((angles.cos(), angles.sin()), dim=1)  # (count, 2)


GAUSSIAN = Mixture(_tensor(1.0), torch.tensor([[0.5, -0.3]], dtype=torch.float64), _tensor(0.3))
FIVE = Mixture(_tensor(0.3, 0.25, 0.2, 0.15, 0.1), _ring(5, 1.0, 0.3), _tensor(0.35, 0.3, 0.25, 0.4, 0.3))
CLASS = Mixture(_tensor(0.6, 0.4), FIVE.means[:2], FIVE.stds[:2])
STIFF = Mixture(
    _tensor(0.3, 0.3, 0.2, 0.2),
    torch.cat((_ring(3, 1.2), torch.zeros(1, 2, dtype=torch.float64))),
    _tensor(0.01, 0.03, 0.1, 0.6),
)
PROBLEMS = (
    Problem("gaussian", GAUSSIAN),
    Problem("mixture", FIVE),
    Problem("guided", FIVE, CLASS, 3.0),
    Problem("stiff", STIFF),
)
