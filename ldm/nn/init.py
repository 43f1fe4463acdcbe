"""Initialisation."""

from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)
Linear = TypeVar("Linear", nn.Linear, nn.Conv2d)


def zeroed(module: Module) -> Module:
    """`module` with every parameter zero, so that the branch which it ends starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def scaled(layer: Linear) -> Linear:
    """`layer` with weights that keep the variance of its input, and no bias.

    PyTorch's default shrinks the signal by 1/sqrt(3) a layer while the biases stay, which a deep decoder must unlearn.
    """
    nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
