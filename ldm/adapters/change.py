"""Changes of one layer's weight, and what weight they lead to."""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Change(Protocol):
    """A change of one weight (out, in[, k, k]), computed in float32."""

    @property
    def shape(self) -> Shape:
        """The shape of the weights that it fits; the last two numbers of a 1x1 convolution may be left out or added."""

    def changed(self, weight: Tensor) -> Tensor:
        """The changed weight, float32, of a weight of that shape."""


def low_rank_delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """ΔW = scale · up · down, (out, in[, k, k])."""
    product = up.flatten(1) @ down.flatten(1)  # (out, in·k·k)
    return scale * product.view(len(up), *down.shape[1:])


@dataclass(frozen=True)
class LowRankChange:
    """ΔW = (alpha / rank) · up · down, with `down` (r, in[, k, k]) and `up` (out, r[, 1, 1]).

    With a `magnitude`, (out, 1[, 1, 1]) or (1, in[, 1, 1]), W + ΔW is scaled to have it as its norms (DoRA).
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def shape(self) -> Shape:
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """ΔW in float32."""
        return low_rank_delta(self.down.float(), self.up.float(), self.alpha / self.rank)

    def changed(self, weight: Tensor) -> Tensor:
        return _changed(weight, self.delta(), self.magnitude)


@dataclass(frozen=True)
class FullChange:
    """ΔW as a whole, which has no factors, or not those of `LowRankChange`."""

    difference: Tensor
    magnitude: Tensor | None = None

    @property
    def shape(self) -> Shape:
        return tuple(self.difference.shape)

    def changed(self, weight: Tensor) -> Tensor:
        return _changed(weight, self.difference.float(), self.magnitude)


def _changed(weight: Tensor, delta: Tensor, magnitude: Tensor | None) -> Tensor:
    weight = weight.float()
    changed = weight + delta.to(weight.device).view(weight.shape)
    if magnitude is None:
        return changed
    magnitude = magnitude.to(weight.device, torch.float32).reshape(*magnitude.shape[:2], *[1] * (weight.ndim - 2))
    return changed * (magnitude / norms(changed, axis=0 if len(magnitude) == len(weight) else 1))


def norms(weight: Tensor, axis: int = 0) -> Tensor:
    """The norm of a weight for each of its outputs, (out, 1[, 1, 1]), or for axis 1 of its inputs, (1, in[, 1, 1])."""
    if axis:
        return norms(weight.transpose(0, 1)).transpose(0, 1)
    return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))


def fits(change: Shape, weight: Shape) -> bool:
    """Whether a change has a weight's shape; that of a 1x1 convolution also fits a linear layer, and the reverse."""
    return change == weight or (change[:2] == weight[:2] and prod(change[2:]) == prod(weight[2:]) == 1)
