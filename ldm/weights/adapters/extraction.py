"""Extracts a LoRA from the difference of two models by the best low-rank approximation (Eckart & Young 1936)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.adapters.change import LowRankChange
from ldm.adapters.targets import Network, layers, targets_of


@dataclass
class Extracted:
    """The changes by layer name, and sums of squares of the differences between the models."""

    changes: dict[str, LowRankChange] = field(default_factory=dict)
    total: float = 0.0  # of all differences
    lost: float = 0.0  # of the residuals of the changed layers
    left_out: float = 0.0  # of tensors that the LoRA does not change, such as norms and biases
    others: list[str] = field(default_factory=list)  # the names of the tensors in `left_out`

    @property
    def error(self) -> float:
        """The norm of the residual relative to the norm of the difference."""
        return float(((self.lost + self.left_out) / self.total) ** 0.5) if self.total else 0.0


def extract(
    base: Network, tuned: Network, rank: int, targets: str = "all", on_layer: Callable[[], object] = lambda: None
) -> Extracted:
    """Returns the changes of rank at most `rank` that best approximate `tuned`, starting from `base`.

    The networks must have the same architecture. `on_layer` is called after each layer. Raises ValueError if the rank
    is less than 1.
    """
    if rank < 1:
        raise ValueError(f"the rank is {rank}, but must be 1 or more")
    found, chosen = Extracted(), targets_of(base, targets)
    before, after = base.state_dict(), tuned.state_dict()
    for name, weight in before.items():
        difference = (after[name].double() - weight.double()) if weight.is_floating_point() else None
        square = 0.0 if difference is None else float(difference.square().sum())
        layer = name.removesuffix(".weight")
        if difference is not None and name.endswith(".weight") and layer in chosen:
            if square:
                change = best(difference, rank)
                found.changes[layer] = change
                found.lost += float((difference - change.delta().double()).square().sum())
            on_layer()
        elif square:
            found.others.append(name)
            found.left_out += square
        found.total += square
    return found


def best(difference: Tensor, rank: int) -> LowRankChange:
    """Returns the best approximation, of rank at most `rank`, of a difference of weights (out, in[, k, k]).

    Its alpha equals its rank, and both factors have the same norm.
    """
    outputs, inputs, *kernel = difference.shape
    u, s, v = torch.linalg.svd(difference.flatten(1).float(), full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    up, down = u[:, :kept] * root, root[:, None] * v[:kept]
    return LowRankChange(down.view(kept, inputs, *kernel), up.view(outputs, kept, *[1] * len(kernel)), float(kept))


def count(base: Network, targets: str) -> int:
    """Returns the number of layers that `extract` processes."""
    return len([name for name in targets_of(base, targets) if name in layers(base)])
