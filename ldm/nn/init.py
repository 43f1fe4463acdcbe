"""Initialisation."""

from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def zeroed(module: Module) -> Module:
    """`module` with every parameter zero, so that the branch which it ends starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
