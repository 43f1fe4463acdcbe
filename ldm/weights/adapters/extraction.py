"""A LoRA from the difference of two models: of each layer's change the best one of a rank (Eckart & Young 1936)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.adapters.change import LowRankChange
from ldm.adapters.targets import Network, layers, targets_of


@dataclass
class Extracted:
    """Changes by the names of layers, and sums of squares of what the models differ by."""

    changes: dict[str, LowRankChange] = field(default_factory=dict)
    total: float = 0.0  # of all differences
    lost: float = 0.0  # of what the changes leave of the layers' differences
    left_out: float = 0.0  # of tensors that are not changed, such as norms and biases
    others: list[str] = field(default_factory=list)  # the names of these

    @property
    def error(self) -> float:
        """The norm of what is missing as a share of the norm of the difference."""
        return float(((self.lost + self.left_out) / self.total) ** 0.5) if self.total else 0.0


def extract(
    base: Network, tuned: Network, rank: int, targets: str = "all", on_layer: Callable[[], object] = lambda: None
) -> Extracted:
    """The changes of rank at most `rank` that bring `base` nearest to `tuned`, two networks of one architecture.

    `on_layer` is called after each layer. Raises ValueError for a rank that is none.
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
    """The change of rank at most `rank` that is nearest to a difference of weights (out, in[, k, k]).

    Its alpha is its rank, and both factors have the same norm.
    """
    outputs, inputs, *kernel = difference.shape
    u, s, v = torch.linalg.svd(difference.flatten(1).float(), full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    up, down = u[:, :kept] * root, root[:, None] * v[:kept]
    return LowRankChange(down.view(kept, inputs, *kernel), up.view(outputs, kept, *[1] * len(kernel)), float(kept))


def count(base: Network, targets: str) -> int:
    """How many layers `extract` goes through."""
    return len([name for name in targets_of(base, targets) if name in layers(base)])
