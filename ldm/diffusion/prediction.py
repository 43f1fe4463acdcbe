"""Prediction types: what the network outputs, out = a·x0 + b·eps, given by the coefficients a and b."""

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
    """Reshapes a coefficient (b,) to (b, 1, …), so that it multiplies x (b, …), in the dtype of x."""
    return coefficient.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class Prediction:
    """One of eps, x0, v (Salimans & Ho 2022) and flow; alpha and sigma are float64 (b,), other tensors (b, …)."""

    def __init__(self, name: str) -> None:
        if name not in COEFFICIENTS:
            raise ValueError(f"prediction is {name!r}, but must be one of {', '.join(COEFFICIENTS)}")
        self.name = name

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a and b, each (b,)."""
        return COEFFICIENTS[self.name](alpha, sigma)

    def determinant(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns d = b·alpha - a·sigma (b,), the determinant of (x0, eps) → (x, out).

        An error e in out becomes an error of sigma/d·e in x0, and of alpha/d·e in eps.
        """
        a, b = self.coefficients(alpha, sigma)
        return b * alpha - a * sigma

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns a·x0 + b·eps, the output of a perfect network."""
        a, b = self.coefficients(alpha, sigma)
        return per_sample(a, x0) * x0 + per_sample(b, x0) * eps

    def convert(self, other: "Prediction", x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Converts `out`, the output for x, to the prediction type `other`, in the dtype of x.

        At alpha = 0, eps determines only itself, and so does x0 at sigma = 0: other conversions are not finite there.
        The result in float32 is within 4·2⁻²⁴·(|p·x| + |q·out|) of that in float64, p and q being the coefficients
        below. For x and out of size 1 this is at most 6e-7 from v and flow, at all times on every schedule. From eps it
        grows with 1/alpha, to 7e-6 at the last index of Stable Diffusion's schedule and 1e-2 at that of cosine; from x0
        it grows with 1/sigma.
        """
        if self.name == other.name:  # also where the quotients below are 0/0
            return out.to(x.dtype)
        a, b = self.coefficients(alpha, sigma)
        a_other, b_other = other.coefficients(alpha, sigma)
        d = self.determinant(alpha, sigma)
        p, q = (a_other * b - b_other * a) / d, other.determinant(alpha, sigma) / d
        return per_sample(p, x) * x + per_sample(q, x) * out

    def to_x0(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns x0 from the output; see `convert`."""
        return self.convert(Prediction("x0"), x, out, alpha, sigma)

    def to_eps(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns eps from the output; see `convert`."""
        return self.convert(Prediction("eps"), x, out, alpha, sigma)
