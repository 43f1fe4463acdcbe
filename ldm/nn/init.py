"""Weight initialisation."""

from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)
Linear = TypeVar("Linear", nn.Linear, nn.Conv2d)


def zeroed(module: Module) -> Module:
    """Sets every parameter of `module` to zero, so that a residual branch that ends in it starts at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def scaled(layer: Linear) -> Linear:
    """Initialises weights so that the layer preserves the variance of its input, and biases to zero.

    PyTorch's default shrinks the signal by 1/sqrt(3) per layer but not the biases, which a deep decoder must unlearn.
    """
    nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
