"""Represents the change of one layer's weight and computes the changed weight."""

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
        """The weight shape that the change fits; the last two axes of a 1x1 convolution may be omitted or added."""

    def changed(self, weight: Tensor) -> Tensor:
        """Returns the changed weight in float32 for a weight of that shape."""


def low_rank_delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Returns ΔW = scale · up · down, (out, in[, k, k])."""
    product = up.flatten(1) @ down.flatten(1)  # (out, in·k·k)
    return scale * product.view(len(up), *down.shape[1:])


@dataclass(frozen=True)
class LowRankChange:
    """ΔW = (alpha / rank) · up · down, with `down` (r, in[, k, k]) and `up` (out, r[, 1, 1]).

    With a `magnitude`, (out, 1[, 1, 1]) or (1, in[, 1, 1]), W + ΔW is rescaled so that its norms equal it (DoRA).
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
        """Returns ΔW in float32."""
        return low_rank_delta(self.down.float(), self.up.float(), self.alpha / self.rank)

    def changed(self, weight: Tensor) -> Tensor:
        return _changed(weight, self.delta(), self.magnitude)


@dataclass(frozen=True)
class FullChange:
    """The full matrix ΔW, for changes that do not have the factors of `LowRankChange`."""

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
    return changed * rescaling(magnitude, norms(changed, axis=0 if magnitude.shape[:2] == (len(weight), 1) else 1))


def rescaling(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Returns magnitude / norm, or 1 where the norm is 0, because zeros have no direction to rescale."""
    return torch.where(norm == 0, 1.0, magnitude / norm.where(norm != 0, 1.0))


def norms(weight: Tensor, axis: int = 0) -> Tensor:
    """Returns the norms of a weight by output, (out, 1[, 1, 1]), or for axis 1 by input, (1, in[, 1, 1])."""
    if axis:
        return norms(weight.transpose(0, 1)).transpose(0, 1)
    return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))


def fits(change: Shape, weight: Shape) -> bool:
    """Returns whether a change fits a weight; shapes of linear layers and 1x1 convolutions fit each other."""
    return change == weight or (change[:2] == weight[:2] and prod(change[2:]) == prod(weight[2:]) == 1)
