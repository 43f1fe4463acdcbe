"""Convolutions and group normalisations on pictures too large for memory: tile by tile, with the whole's result.

A tile is computed with as much around it as the layers reach to and cropped, so convolutions give what they give on
the whole picture. A group normalisation sees all of it: each is measured over all tiles, in the order of the layers,
with the statistics of those before it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.nn.layers import Downsample, ResBlock, Upsample


class Box(NamedTuple):
    """A rectangle of cells."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    def of(self, x: Tensor, cell: int) -> Tensor:
        """What lies in the box of x (…, h, w), where a cell is `cell` pixels wide."""
        return x[..., self.top * cell : self.bottom * cell, self.left * cell : self.right * cell]

    def within(self, other: "Box") -> "Box":
        """The same cells, counted from the corner of `other`."""
        return Box(self.top - other.top, self.bottom - other.top, self.left - other.left, self.right - other.left)


def tiles(height: int, width: int, side: int, reach: int) -> Iterator[tuple[Box, Box]]:
    """Boxes of `side` cells that cover the picture, each with the box around it that it depends on."""
    for top in range(0, height, side):
        for left in range(0, width, side):
            bottom, right = min(top + side, height), min(left + side, width)
            yield (
                Box(top, bottom, left, right),
                Box(max(top - reach, 0), min(bottom + reach, height), max(left - reach, 0), min(right + reach, width)),
            )


def in_tiles(layers: nn.Sequential, x: Tensor, side: int) -> Tensor:
    """layers(x) of one x (1, c, h, w), in tiles that are `side` pixels of x wide; no gradient is meant to pass.

    Each group normalisation in `layers` costs a pass over the layers before it.
    """
    cell_in, cell_out = cells(layers)
    height, width = x.shape[2] // cell_in, x.shape[3] // cell_in
    boxes = list(tiles(height, width, side // cell_in, math.ceil(reach(layers) / cell_in)))
    if len(boxes) == 1:
        return layers(x)
    norms = [module for module in layers.modules() if isinstance(module, nn.GroupNorm)]
    statistics: dict[nn.GroupNorm, Tensor] = {}
    with _normalising_by(statistics, norms):
        for norm in norms:
            total = torch.zeros(2, norm.num_groups, dtype=torch.float64, device=x.device)
            for core, window in boxes:
                seen = _input_of(norm, layers, window.of(x, cell_in))
                part = core.within(window).of(seen, seen.shape[3] // (window.right - window.left))
                total += _moments(part, norm.num_groups) * core.area / (height * width)
            statistics[norm] = total
        out = None
        for core, window in boxes:
            tile = layers(window.of(x, cell_in))
            out = tile.new_empty(1, tile.shape[1], height * cell_out, width * cell_out) if out is None else out
            core.of(out, cell_out).copy_(core.within(window).of(tile, cell_out))
    assert out is not None
    return out


def cells(layers: nn.Sequential) -> tuple[int, int]:
    """Into squares of how many pixels, of the layers' input and output, both can be cut alike."""
    smaller = larger = 1
    for layer in layers:
        match layer:
            case Upsample():
                larger *= 2
            case Downsample():
                smaller *= 2
            case nn.PixelShuffle():
                larger *= layer.upscale_factor
            case nn.PixelUnshuffle():
                smaller *= layer.downscale_factor
    return smaller, larger


def reach(layers: nn.Sequential) -> int:
    """How many pixels of their input the layers look at to each side of a pixel."""
    seen = 0
    for layer in reversed(list(layers)):
        match layer:
            case Upsample():
                seen = math.ceil((seen + 1) / 2)
            case Downsample():
                seen = 2 * seen + 1
            case ResBlock():
                seen += 2
            case nn.Conv2d():
                seen += layer.kernel_size[0] // 2
            case nn.PixelShuffle():
                seen = math.ceil(seen / layer.upscale_factor)
            case nn.PixelUnshuffle():
                seen *= layer.downscale_factor
    return seen


class _Reached(Exception):
    def __init__(self, x: Tensor) -> None:
        self.x = x


def _input_of(norm: nn.Module, layers: nn.Module, x: Tensor) -> Tensor:
    """What `norm` gets to see of layers(x); it and what follows is not computed."""

    def stop(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        raise _Reached(inputs[0])

    handle = norm.register_forward_pre_hook(stop)
    try:
        layers(x)
    except _Reached as reached:
        return reached.x
    finally:
        handle.remove()
    raise ValueError(f"the layers never come to their {norm}")


def _moments(x: Tensor, groups: int) -> Tensor:
    """Mean and mean square (2, g) of each group of x (1, c, h, w)."""
    variance, mean = torch.var_mean(x[0].unflatten(0, (groups, -1)), dim=(1, 2, 3), correction=0)
    mean, variance = mean.double(), variance.double()
    return torch.stack([mean, variance + mean**2])


@contextmanager
def _normalising_by(statistics: dict[nn.GroupNorm, Tensor], norms: list[nn.GroupNorm]) -> Iterator[None]:
    """`norms` use the mean and mean square that `statistics` holds, or comes to hold, of them."""

    def normalise(norm: nn.GroupNorm, inputs: tuple[Tensor], _output: Tensor) -> Tensor | None:
        if norm not in statistics:
            return None
        mean, square = statistics[norm].repeat_interleave(norm.num_channels // norm.num_groups, dim=1)  # (2, c)
        scale = norm.weight * (square - mean**2 + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        (x,) = inputs
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])

    handles = [norm.register_forward_hook(normalise) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
