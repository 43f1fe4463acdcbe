"""Merges changes into the weights of a network's plain layers and restores the original weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.adapters.change import Change, fits
from ldm.adapters.targets import layers

Weighted = Sequence[tuple[Change, float]]
Originals = dict[str, Tensor]


def merged(weight: Tensor, changes: Weighted) -> Tensor:
    """Returns W + Σ sᵢ · (changedᵢ(W) - W). Each change is computed from the base weight W, so order is irrelevant.

    The sum is computed in float32, with a rounding error for k changes of a few times k · 2⁻²⁴ of the largest term, and
    rounded once to the dtype of `weight`. A change with scale 0 has no effect.
    """
    plain = total = weight.float()
    for change, scale in changes:
        changed = change.changed(plain)
        total = changed if scale == 1 and len(changes) == 1 else total + scale * (changed - plain)
    return torch.empty_like(weight).copy_(total)


def merge(network: nn.Module, changes: Mapping[str, Weighted]) -> Originals:
    """Merges changes into layers, given by name, and returns their original weights for `restore`.

    Raises ValueError if the network lacks a layer or if a change has another shape than the weight.
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
    """Restores the original weights that `merge` returned, bit for bit."""
    found = layers(network)
    for name, weight in originals.items():
        found[name].weight.data = weight
