"""Implements power-function EMA profiles and their post-hoc reconstruction from snapshots (Karras et al. 2024, EDM2).

The average at step t multiplies the weights of step τ by (γ+1) τ^γ / t^(γ+1), so that it covers the same fraction of
training at every t. Its length is the standard deviation of τ/t, σ_rel in the paper.
"""

from collections.abc import Sequence

import numpy as np

MAX_LENGTH = 12**-0.5  # length of the uniform mean of all steps, γ = 0


def exponent(length: float) -> float:
    """Returns γ of a length: the largest root of (γ+1) = length² (γ+2)² (γ+3)."""
    if not 0 < length < MAX_LENGTH:
        raise ValueError(
            f"the length of an average is {length}, but must be a fraction of training between 0 and 0.288"
        )
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(gamma: float, step: int) -> float:
    """Returns β of average ← β·average + (1-β)·weight at steps 1, 2, …; at step 1 it is 0."""
    return float((1 - 1 / step) ** (gamma + 1))


def overlap(steps: np.ndarray, gammas: np.ndarray, other_steps: np.ndarray, other_gammas: np.ndarray) -> np.ndarray:
    """Returns the integral over τ of the product of two profiles; the arrays broadcast."""
    smaller, larger = np.minimum(steps, other_steps), np.maximum(steps, other_steps)
    scale = (gammas + 1) * (other_gammas + 1) / (gammas + other_gammas + 1)
    return scale * (smaller / steps) ** gammas * (smaller / other_steps) ** other_gammas / larger


def coefficients(steps: Sequence[int], gammas: Sequence[float], step: int, gamma: float) -> tuple[np.ndarray, float]:
    """Returns the least-squares coefficients of snapshots (each a step and γ) for the average of `step` and `gamma`.

    Also returns the error of the resulting profile, as a fraction of its norm.
    """
    t, g = np.asarray(steps, float), np.asarray(gammas, float)
    norms = np.sqrt(overlap(t, g, t, g))
    mutual = overlap(t[:, None], g[:, None], t, g) / np.outer(norms, norms)
    target = overlap(t, g, np.asarray(float(step)), np.asarray(gamma)) / norms
    x = np.linalg.lstsq(mutual, target, rcond=1e-14)[0]
    norm = overlap(*(np.asarray(value, float) for value in (step, gamma, step, gamma)))
    squared_error = max(0.0, 1 - float(2 * x @ target - x @ mutual @ x) / float(norm))
    return x / norms, squared_error**0.5
