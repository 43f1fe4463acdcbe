"""Changes merged into the weights of a network whose layers stay plain, and taken out again."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.adapters.change import Change, fits
from ldm.adapters.targets import layers

Weighted = Sequence[tuple[Change, float]]
Originals = dict[str, Tensor]


def merged(weight: Tensor, changes: Weighted) -> Tensor:
    """W + Σ sᵢ · (changedᵢ(W) - W): every change is computed from the base weight W, so that their order is irrelevant.

    It is computed in float32, in which it is exact but for rounding (for k changes a few times k · 2⁻²⁴ of the largest
    term), and rounded once to the type of `weight`. A change of weight 0 changes nothing.
    """
    plain = total = weight.float()
    for change, scale in changes:
        changed = change.changed(plain)
        total = changed if scale == 1 and len(changes) == 1 else total + scale * (changed - plain)
    return torch.empty_like(weight).copy_(total)


def merge(network: nn.Module, changes: Mapping[str, Weighted]) -> Originals:
    """Merges changes into the layers so named and returns the weights that they had, for `restore`.

    Raises ValueError for a layer that the network does not have and for changes of another shape.
    """
    found = layers(network)
    for name, weighted in changes.items():
        if name not in found:
            raise ValueError(f"the network has no linear or convolution layer {name}, which an adapter changes")
        for change, _ in weighted:
            if not fits(change.shape, tuple(found[name].weight.shape)):
                raise ValueError(
                    f"an adapter changes a weight {list(change.shape)} of the layer {name}, whose weight is "
                    f"{list(found[name].weight.shape)}"
                )
    originals = {}
    for name, weighted in changes.items():
        layer = found[name]
        originals[name] = layer.weight.data
        layer.weight.data = merged(layer.weight.data, weighted)
    return originals


def restore(network: nn.Module, originals: Originals) -> None:
    """Puts back, bit for bit, the weights that `merge` returned."""
    found = layers(network)
    for name, weight in originals.items():
        found[name].weight.data = weight
