"""Averages of weights by a power of the step, and any of them from snapshots of others (Karras et al. 2024, EDM2).

The average at step t weighs the weights of step τ by (γ+1) τ^γ / t^(γ+1): however long the training, it reaches back
over the same share of it. Its length is the standard deviation of τ/t, the paper's σ_rel.
"""

from collections.abc import Sequence

import numpy as np

LONGEST = 12**-0.5  # of the plain mean of all steps, γ = 0


def exponent(length: float) -> float:
    """γ of a length: the largest root of (γ+1) = length² (γ+2)² (γ+3)."""
    if not 0 < length < LONGEST:
        raise ValueError(f"the length of an average is a share of the training between 0 and 0.288, not {length}")
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(gamma: float, step: int) -> float:
    """β of average ← β·average + (1-β)·weight at steps 1, 2, …; the first forgets all before it."""
    return float((1 - 1 / step) ** (gamma + 1))


def overlap(steps: np.ndarray, gammas: np.ndarray, other_steps: np.ndarray, other_gammas: np.ndarray) -> np.ndarray:
    """The integral over all τ of the product of two profiles; the arrays broadcast."""
    least, most = np.minimum(steps, other_steps), np.maximum(steps, other_steps)
    scale = (gammas + 1) * (other_gammas + 1) / (gammas + other_gammas + 1)
    return scale * (least / steps) ** gammas * (least / other_steps) ** other_gammas / most


def coefficients(steps: Sequence[int], gammas: Sequence[float], step: int, gamma: float) -> tuple[np.ndarray, float]:
    """How much of each snapshot (its step and γ) gives the average of `step` and `gamma` by least squares.

    Also how far the profile so made is off, as a share of its norm.
    """
    t, g = np.asarray(steps, float), np.asarray(gammas, float)
    norms = np.sqrt(overlap(t, g, t, g))
    mutual = overlap(t[:, None], g[:, None], t, g) / np.outer(norms, norms)
    wanted = overlap(t, g, np.asarray(float(step)), np.asarray(gamma)) / norms
    x = np.linalg.lstsq(mutual, wanted, rcond=1e-14)[0]
    norm = overlap(*(np.asarray(value, float) for value in (step, gamma, step, gamma)))
    missed = max(0.0, 1 - float(2 * x @ wanted - x @ mutual @ x) / float(norm))
    return x / norms, missed**0.5
