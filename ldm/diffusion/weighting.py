"""How much the squared error counts at each noise level.

A weighting is written in the space of its paper as a function of log-SNR, and carried to the output here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.prediction import Prediction

TINY = 1e-150  # stands for 0 in the limits of SNR → 0 and SNR → ∞: its square is still a float64


@dataclass(frozen=True)
class Weighting:
    """`weight` of log-SNR multiplies the squared error of what `space` names."""

    name: str
    space: Literal["output", "x0", "eps"]
    weight: Callable[[Tensor], Tensor]

    def __call__(self, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Tensor:
        """The weight (b,) of the output's squared error, for float64 alpha and sigma (b,)."""
        alpha, sigma = alpha.clamp(min=TINY), sigma.clamp(min=TINY)
        weight = self.weight(2 * (alpha / sigma).log())
        if self.space == "output":
            return weight
        error = sigma if self.space == "x0" else alpha
        return weight * (error / prediction.determinant(alpha, sigma)).square()


def uniform() -> Weighting:
    """The plain mean squared error of the output."""
    return Weighting("uniform", "output", torch.ones_like)


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(SNR, gamma) on x0 (Hang et al. 2023)."""
    if gamma <= 0:
        raise ValueError(f"min_snr's gamma is {gamma}, but must be positive")
    return Weighting("min_snr", "x0", lambda log_snr: log_snr.exp().clamp(max=gamma))
