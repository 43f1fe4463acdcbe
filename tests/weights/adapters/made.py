"""Builds small random changes of the layers of a network, and compares changes."""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.change import Change, LowRankChange, norms
from ldm.adapters.targets import layers, targets_of
from ldm.weights.adapters.names import public_names

State = dict[str, Tensor]


def changes(
    network: Any,
    targets: str | list[str] = "all",
    dtype: torch.dtype = torch.float32,
    magnitude: int | None = None,
    alpha: float | None = None,
    size: float = 0.1,
) -> dict[str, Change]:
    """Returns a change for each layer by public name, with rank 2 or 3 and, unless `alpha` is given, varying alphas.

    The changes have magnitudes of outputs if `magnitude` is 0 and of inputs if it is 1. `size` is the standard
    deviation of the `up` factors; the default has a measurable effect.
    """
    generator, found = torch.Generator().manual_seed(0), layers(network)
    kind = getattr(network, "kind", "text_tower")
    made: dict[str, Change] = {}
    for k, (name, public) in enumerate(public_names(kind, network.config, targets_of(network, targets)).items()):
        weight, rank = found[name].weight.detach(), 2 + k % 2
        outputs, inputs, *kernel = weight.shape
        down = torch.randn(rank, inputs, *kernel, generator=generator).to(dtype)
        up = (size * torch.randn(outputs, rank, *[1] * len(kernel), generator=generator)).to(dtype)
        vector = None
        if magnitude is not None:
            vector = norms(weight.float(), magnitude)
            vector = (vector * (0.5 + torch.rand(vector.shape, generator=generator))).to(dtype)
        made[public] = LowRankChange(down, up, float(1 + k % 4) if alpha is None else alpha, vector)
    return made


def same(one: Change, two: Change) -> bool:
    """Returns whether two changes are bit-identical, including their dtypes."""
    assert isinstance(one, LowRankChange) and isinstance(two, LowRankChange)
    pairs = [(one.down, two.down), (one.up, two.up)]
    if one.magnitude is not None and two.magnitude is not None:
        pairs.append((one.magnitude, two.magnitude))
    agree = all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
    return agree and one.alpha == two.alpha and (one.magnitude is None) == (two.magnitude is None)


def merged_by(network: nn.Module, name: str) -> Tensor:
    """Returns the weight of one layer."""
    weight: Tensor = layers(network)[name].weight.detach()
    return weight
