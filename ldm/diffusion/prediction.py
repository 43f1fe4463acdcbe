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

    def to(self, other: "Prediction", x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output of type `other` that says the same as `out` of x, in the type of x.

        eps at alpha = 0 and x0 at sigma = 0 tell only themselves: the rest is not finite there. Done in float32 it is
        within 4·2⁻²⁴·(|p·x| + |q·out|) of float64, p and q being the coefficients below. For x and out of size 1 that
        is at most 6e-7 from v and flow at all times on every schedule; from eps it grows with 1/alpha, to 7e-6 at
        the last index of Stable Diffusion and 1e-2 at cosine's; from x0 with 1/sigma.
        """
        if self.name == other.name:  # also where the quotient is 0/0
            return out.to(x.dtype)
        a, b = self.coefficients(alpha, sigma)
        a_other, b_other = other.coefficients(alpha, sigma)
        d = self.determinant(alpha, sigma)
        p, q = (a_other * b - b_other * a) / d, other.determinant(alpha, sigma) / d
        return per_sample(p, x) * x + per_sample(q, x) * out

    def to_x0(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Data from the output; see `to`."""
        return self.to(Prediction("x0"), x, out, alpha, sigma)

    def to_eps(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Noise from the output; see `to`."""
        return self.to(Prediction("eps"), x, out, alpha, sigma)
