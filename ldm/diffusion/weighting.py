"""Loss weightings: the weight of the squared error at each noise level.

Each weighting is defined as in its paper, as a function of log-SNR that weighs the error of x0, eps or the output;
`Weighting` converts it to a weight of the output's error.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.prediction import Prediction

TINY = 1e-150  # replaces 0 in the limits of SNR → 0 and SNR → ∞, since its square is still a float64 above 0


@dataclass(frozen=True)
class Weighting:
    """`weight`, a function of log-SNR, multiplies the squared error in `space`; `settings` are its parameters."""

    name: str
    space: Literal["output", "x0", "eps"]
    weight: Callable[[Tensor], Tensor]
    settings: dict[str, float] = field(default_factory=dict)

    def __call__(self, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Tensor:
        """Returns the weight (b,) of the output's squared error, for float64 alpha and sigma (b,)."""
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
    _check_positive("min_snr", gamma=gamma)
    return Weighting("min_snr", "x0", lambda log_snr: log_snr.exp().clamp(max=gamma), {"gamma": gamma})


def soft_min_snr(gamma: float = 5.0) -> Weighting:
    """SNR·gamma / (SNR + gamma) on x0 (Crowson et al. 2024, where gamma is 1 / sigma_data² = 4)."""
    _check_positive("soft_min_snr", gamma=gamma)
    return Weighting("soft_min_snr", "x0", lambda log_snr: 1 / ((-log_snr).exp() + 1 / gamma), {"gamma": gamma})


def edm(sigma_data: float = 1.0) -> Weighting:
    """SNR + 1 / sigma_data² on x0 (Karras et al. 2022, table 1); for sigma_data = 1 it is `uniform` on v."""
    _check_positive("edm", sigma_data=sigma_data)
    return Weighting("edm", "x0", lambda log_snr: log_snr.exp() + sigma_data**-2, {"sigma_data": sigma_data})


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """1 / (k + SNR)^gamma on eps (Choi et al. 2022, equation 8)."""
    _check_positive("p2", gamma=gamma, k=k)
    return Weighting("p2", "eps", lambda log_snr: (k + log_snr.exp()) ** -gamma, {"gamma": gamma, "k": k})


def sigmoid(bias: float = 2.0) -> Weighting:
    """sigmoid(bias - log SNR) on eps (Kingma & Gao 2023), whatever the distribution of times. The paper's loss is an
    integral over log-SNR, so it equals this one if log-SNR is uniform, as with schedule=edm and times=uniform."""
    if not isfinite(bias):
        raise ValueError(f"sigmoid's bias is {bias}, but must be finite")
    return Weighting("sigmoid", "eps", lambda log_snr: (bias - log_snr).sigmoid(), {"bias": bias})


def debiased() -> Weighting:
    """1 / sqrt(SNR) on eps (Yu et al. 2023)."""
    return Weighting("debiased", "eps", lambda log_snr: (-log_snr / 2).exp())


def _check_positive(weighting: str, **settings: float) -> None:
    for name, value in settings.items():
        if not 0 < value < inf:
            raise ValueError(f"{weighting}'s {name} is {value}, but must be positive")


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "uniform": uniform,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "edm": edm,
    "p2": p2,
    "sigmoid": sigmoid,
    "debiased": debiased,
}
