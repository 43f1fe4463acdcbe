"""Fréchet distance between Gaussians fitted to features (Dowson & Landau 1982; Heusel et al. 2017, equation 6)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and unbiased covariance (d, d) of `count` feature vectors, float64."""

    count: int
    mean: Tensor
    covariance: Tensor


def gram(features: Tensor) -> Tensor:
    """Returns the sum of [1, x]ᵀ[1, x] over features (n, d): float64 (d + 1, d + 1). Sums of several sets add up."""
    x = torch.nn.functional.pad(features.double(), (1, 0), value=1.0)
    return x.T @ x


def moments(gram: Tensor) -> Moments:
    """Returns the moments of the features summed in a Gram matrix. Raises ValueError for fewer than two."""
    count = round(gram[0, 0].item())
    if count < 2:
        raise ValueError(f"a covariance needs at least two images, not {count}")
    mean = gram[0, 1:] / count
    return Moments(count, mean, (gram[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1))


def moments_of(features: Tensor) -> Moments:
    """Returns the moments of features (n, d)."""
    return moments(gram(features))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Returns |mean difference|² + tr(A + B - 2 (AB)^½); covariances may be singular."""
    trace = a.covariance.trace() + b.covariance.trace() - 2 * _trace_of_root(a.covariance, b.covariance)
    return ((a.mean - b.mean).square().sum() + trace).clamp(min=0).item()


def _trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    """Returns tr((AB)^½): AB has the eigenvalues of the symmetric LᵀBL, for any L with LLᵀ = A."""
    root, failed = torch.linalg.cholesky_ex(a)
    if failed:  # singular up to rounding
        values, vectors = torch.linalg.eigh(a)
        root = vectors * values.clamp(min=0).sqrt()
    return torch.linalg.eigvalsh(root.T @ b @ root).clamp(min=0).sqrt().sum()
