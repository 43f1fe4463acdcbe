"""What the network outputs, as two coefficients: out = a·x0 + b·eps."""

from collections.abc import Callable

import torch
from torch import Tensor

COEFFICIENTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "x0": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha)),
}


def per_sample(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient (b,) made to multiply x (b, …), in the type of x."""
    return coefficient.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class Prediction:
    """One of eps, x0, v (Salimans & Ho 2022) and flow; alpha and sigma are float64 (b,), the rest (b, …)."""

    def __init__(self, name: str) -> None:
        if name not in COEFFICIENTS:
            raise ValueError(f"prediction is {name!r}, but must be one of {', '.join(COEFFICIENTS)}")
        self.name = name

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """a and b, each (b,)."""
        return COEFFICIENTS[self.name](alpha, sigma)

    def determinant(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """b·alpha - a·sigma (b,), by which (x, out) → (x0, eps) divides: an error in out is one in x0 of
        sigma/determinant times its size, and one in eps of alpha/determinant times its size."""
        a, b = self.coefficients(alpha, sigma)
        return b * alpha - a * sigma

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        a, b = self.coefficients(alpha, sigma)
        return per_sample(a, x0) * x0 + per_sample(b, x0) * eps

    def to_x0(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Data from the output, in the type of x; undefined for eps where alpha is 0."""
        if self.name == "x0":  # also at sigma = 0, where the quotient is 0/0
            return out.to(x.dtype)
        _, b = self.coefficients(alpha, sigma)
        d = self.determinant(alpha, sigma)
        return per_sample(b / d, x) * x - per_sample(sigma / d, x) * out

    def to_eps(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Noise from the output, in the type of x; undefined for x0 where sigma is 0."""
        if self.name == "eps":  # also at alpha = 0, where the quotient is 0/0
            return out.to(x.dtype)
        a, _ = self.coefficients(alpha, sigma)
        d = self.determinant(alpha, sigma)
        return per_sample(alpha / d, x) * out - per_sample(a / d, x) * x
