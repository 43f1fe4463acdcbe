"""The Muon optimizer (Jordan 2024): momentum with orthogonalised matrix updates."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

ITERATIONS = 4  # the maximum in bfloat16: a fifth amplifies rounding errors without bound on low-rank matrices
QUINTIC = 3.4445, -4.7750, 2.0315  # (a, b, c) of s·(a + b·s² + c·s⁴), which drives singular values towards 1


def orthogonal(matrices: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Approximates U·Vᵀ for each matrix U·S·Vᵀ of (n, r, c) by Newton-Schulz iterations.

    Singular values above 1/20 of the largest one are mapped to between 0.6 and 1.4, smaller ones to less. The
    iterations run on the smaller Gram matrix, so that only two products involve the long side.
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
    """Muon for weights of two or more dimensions, which count as matrices with outputs as rows; AdamW for the rest.

    Orthogonal updates are scaled to the RMS of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training"), so that
    one `lr` serves both; `betas` and `eps` are AdamW's. `params` may be groups, each with an `lr` of its own.
    `precision` is that of the Trainer: with bf16-mixed the updates are orthogonalised in bfloat16. Weights must not be
    sharded over ranks, because it needs full matrices. As in PyTorch's fused optimizers, a step whose `found_inf` is a
    tensor of 1 changes neither weights nor state, and the tensor is not read back from its device.
    """

    skips_broken_steps = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 4e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        iterations: int = ITERATIONS,
        precision: str = "32-true",
    ) -> None:
        if not (lr >= 0 and 0 <= momentum < 1 and iterations >= 1):
            raise ValueError(
                f"Muon's (lr, momentum, iterations) are {(lr, momentum, iterations)}, but lr must be >= 0, momentum in "
                "[0, 1) and iterations >= 1"
            )
        if precision == "bf16-mixed" and iterations > ITERATIONS:
            raise ValueError(f"Muon's iterations are {iterations}, but must be at most {ITERATIONS} in bfloat16")
        self.dtype = torch.bfloat16 if precision == "bf16-mixed" else None  # None: the dtype of the weights
        given: list[Any] = list(params)
        sets: list[dict[str, Any]] = given if given and isinstance(given[0], dict) else [{"params": given}]
        groups: list[dict[str, Any]] = [
            {
                **one,
                "params": [weight for weight in one["params"] if (weight.ndim >= 2) == matrices],
                "matrices": matrices,
            }
            for one in sets
            for matrices in (True, False)
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
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                update = self._orthogonal if group["matrices"] else self._adamw
                update(weights, [weight.grad for weight in weights], group)
        return loss

    def _orthogonal(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        averages = [self.state[weight]["momentum"] for weight in weights]
        rate = group["lr"] * group["weight_decay"]
        kept: Any = 1 - rate
        if (skip := self.found_inf) is not None:
            kept = (1 - rate * (1 - skip.double())).to(weights[0].dtype)
            # Gradients that equal their averages leave these unchanged.
            gradients = [torch.where(skip.bool(), *pair) for pair in zip(averages, gradients, strict=True)]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov's
        torch._foreach_mul_(weights, kept)
        by_shape = defaultdict(list)
        for weight, direction in zip(weights, directions, strict=True):
            matrix = direction.flatten(1)
            by_shape[matrix.shape].append((weight, matrix))
        for shape, pairs in by_shape.items():
            matrices = torch.stack([matrix for _, matrix in pairs])
            stacked = orthogonal(matrices.to(self.dtype), group["iterations"]).to(matrices.dtype)
            stacked = stacked if skip is None else stacked.masked_fill_(skip.bool(), 0)
            updates = [update.view_as(weight) for update, (weight, _) in zip(stacked, pairs, strict=True)]
            size = 0.2 * max(shape) ** 0.5
            torch._foreach_sub_([weight for weight, _ in pairs], updates, alpha=group["lr"] * size)

    def _adamw(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if not (state := self.state[weight]):
                state["step"] = torch.zeros((), device=weight.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        states = [self.state[weight] for weight in weights]
        means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        first, second = group["betas"]
        adamw(
            weights,
            gradients,
            exp_avgs=means,
            exp_avg_sqs=squares,
            max_exp_avg_sqs=[],
            state_steps=steps,
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
