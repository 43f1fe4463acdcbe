"""Muon (Jordan 2024): momentum, with each matrix's update made orthogonal."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

QUINTIC = 3.4445, -4.7750, 2.0315  # of s·(a + b·s² + c·s⁴), which drives singular values towards 1


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """About U·Vᵀ of U·S·Vᵀ = each matrix of (n, r, c): singular values come out between 0.7 and 1.2.

    Newton-Schulz, run on the smaller Gram matrix alone, so that the long side is multiplied only twice.
    """
    a, b, c = QUINTIC
    x = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    product = None
    for left in reversed(range(iterations)):
        factor = b * gram + c * (gram @ gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if left:
            gram = factor @ gram @ factor
    x = product @ x
    return x if matrices.shape[-2] <= matrices.shape[-1] else x.mT


class Muon(Optimizer):
    """Every weight of two or more dimensions is a matrix (its rows the outputs) and gets an orthogonal update, whose
    entries are as large as AdamW's would be (Liu et al. 2025, "Muon is scalable for LLM training"), so that one `lr`
    serves both; the rest gets AdamW's, by `betas` and `eps`.

    It needs whole matrices: not for weights that are sharded over ranks.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 4e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        iterations: int = 5,
    ) -> None:
        if not (lr >= 0 and 0 <= momentum < 1 and iterations >= 1):
            raise ValueError(
                f"Muon takes lr >= 0, momentum in [0, 1) and iterations >= 1, not {(lr, momentum, iterations)}"
            )
        weights = list(params)
        groups: list[dict[str, Any]] = [
            {"params": [weight for weight in weights if weight.ndim >= 2], "matrices": True},
            {"params": [weight for weight in weights if weight.ndim < 2], "matrices": False},
        ]
        settings = dict(momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay, iterations=iterations)
        super().__init__([group for group in groups if group["params"]], {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            pairs = [(weight, weight.grad) for weight in group["params"] if weight.grad is not None]
            updates = self._orthogonal(pairs, group) if group["matrices"] else self._adam(pairs, group)
            for (weight, _), update in zip(pairs, updates, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        return loss

    def _orthogonal(self, pairs: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> list[Tensor]:
        alike: dict[tuple[int, int], list[int]] = {}
        directions = []
        for place, (weight, gradient) in enumerate(pairs):
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
            directions.append(gradient.lerp(average, group["momentum"]).flatten(1))  # Nesterov's
            alike.setdefault((weight.shape[0], weight[0].numel()), []).append(place)
        updates = list(directions)
        for shape, places in alike.items():
            made = orthogonal(torch.stack([directions[place] for place in places]), group["iterations"])
            for place, update in zip(places, 0.2 * max(shape) ** 0.5 * made, strict=True):
                updates[place] = update.view_as(pairs[place][0])
        return updates

    def _adam(self, pairs: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> list[Tensor]:
        updates = []
        for weight, gradient in pairs:
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["mean"], state["square"] = torch.zeros_like(weight), torch.zeros_like(weight)
            state["step"] += 1
            (first, second), step = group["betas"], float(state["step"])
            mean = state["mean"].lerp_(gradient, 1 - first) / (1 - first**step)
            square = state["square"].lerp_(gradient.square(), 1 - second) / (1 - second**step)
            updates.append(mean / (square.sqrt() + group["eps"]))
        return updates
