"""Applies convolutions and group normalisations in tiles, for images whose activations do not fit in memory.

The result is the same as on the full image. Each tile is computed with the margin that the layers' receptive field
needs, and then cropped. Group normalisations need statistics of the full image: these are accumulated over all tiles,
for one normalisation after another, in the order of the layers.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.nn.layers import Downsample, ResBlock, Upsample


class Box(NamedTuple):
    """A rectangle of cells; a cell is the smallest square of pixels at which a tile may be cut."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    def crop(self, x: Tensor, cell: int) -> Tensor:
        """Returns the box of x (…, h, w), where a cell is `cell` pixels wide."""
        return x[..., self.top * cell : self.bottom * cell, self.left * cell : self.right * cell]

    def relative_to(self, other: "Box") -> "Box":
        """Returns the same cells, counted from the top left corner of `other`."""
        return Box(self.top - other.top, self.bottom - other.top, self.left - other.left, self.right - other.left)


def tiles(height: int, width: int, side: int, margin: int) -> Iterator[tuple[Box, Box]]:
    """Yields boxes of `side` cells that cover the image, each with its window: the box and `margin` cells around it."""
    for top in range(0, height, side):
        for left in range(0, width, side):
            bottom, right = min(top + side, height), min(left + side, width)
            yield (
                Box(top, bottom, left, right),
                Box(
                    max(top - margin, 0),
                    min(bottom + margin, height),
                    max(left - margin, 0),
                    min(right + margin, width),
                ),
            )


def apply_in_tiles(layers: nn.Sequential, x: Tensor, side: int) -> Tensor:
    """Returns layers(x) for one x (1, c, h, w), computed in tiles that are `side` pixels of x wide, without gradients.

    Each group normalisation in `layers` costs one pass through the layers before it.
    """
    cell_in, cell_out = cell_sizes(layers)
    height, width = x.shape[2] // cell_in, x.shape[3] // cell_in
    boxes = list(tiles(height, width, side // cell_in, math.ceil(receptive_radius(layers) / cell_in)))
    if len(boxes) == 1:
        return layers(x)
    norms = [module for module in layers.modules() if isinstance(module, nn.GroupNorm)]
    statistics: dict[nn.GroupNorm, Tensor] = {}
    with _normalising_by(statistics, norms):
        for norm in norms:
            total = torch.zeros(2, norm.num_groups, dtype=torch.float64, device=x.device)
            for core, window in boxes:
                hidden = _input_of(norm, layers, window.crop(x, cell_in))
                part = core.relative_to(window).crop(hidden, hidden.shape[3] // (window.right - window.left))
                total += _moments(part, norm.num_groups) * core.area / (height * width)
            statistics[norm] = total
        out = None
        for core, window in boxes:
            tile = layers(window.crop(x, cell_in))
            out = tile.new_empty(1, tile.shape[1], height * cell_out, width * cell_out) if out is None else out
            core.crop(out, cell_out).copy_(core.relative_to(window).crop(tile, cell_out))
    assert out is not None
    return out


def cell_sizes(layers: nn.Sequential) -> tuple[int, int]:
    """Returns the width of a cell in pixels of the layers' input, and in pixels of their output."""
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


def receptive_radius(layers: nn.Sequential) -> int:
    """Returns how many pixels of their input, to each side, an output pixel of the layers depends on."""
    radius = 0
    for layer in reversed(list(layers)):
        match layer:
            case Upsample():
                radius = math.ceil((radius + 1) / 2)
            case Downsample():
                radius = 2 * radius + 1
            case ResBlock():
                radius += 2
            case nn.Conv2d():
                radius += layer.kernel_size[0] // 2
            case nn.PixelShuffle():
                radius = math.ceil(radius / layer.upscale_factor)
            case nn.PixelUnshuffle():
                radius *= layer.downscale_factor
    return radius


class _Reached(Exception):
    """Carries the input of a layer out of the forward pass that it interrupts."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def _input_of(norm: nn.Module, layers: nn.Module, x: Tensor) -> Tensor:
    """Returns the input of `norm` in layers(x), computing only the layers before it."""

    def stop(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        raise _Reached(inputs[0])

    handle = norm.register_forward_pre_hook(stop)
    try:
        layers(x)
    except _Reached as reached:
        return reached.x
    finally:
        handle.remove()
    raise ValueError(f"the layers never call their {norm}")


def _moments(x: Tensor, groups: int) -> Tensor:
    """Returns the mean and mean square (2, g) of each group of x (1, c, h, w)."""
    variance, mean = torch.var_mean(x[0].unflatten(0, (groups, -1)), dim=(1, 2, 3), correction=0)
    mean, variance = mean.double(), variance.double()
    return torch.stack([mean, variance + mean**2])


@contextmanager
def _normalising_by(statistics: dict[nn.GroupNorm, Tensor], norms: list[nn.GroupNorm]) -> Iterator[None]:
    """Makes `norms` normalise by the mean and mean square in `statistics`, as soon as it has theirs."""

    def normalise(norm: nn.GroupNorm, inputs: tuple[Tensor], _output: Tensor) -> Tensor | None:
        if norm not in statistics:
            return None
        mean, square = statistics[norm].repeat_interleave(norm.num_channels // norm.num_groups, dim=1)  # (2, c)
        scale = norm.weight * (square - mean**2 + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        (x,) = inputs
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])

    # Before other hooks, because that of offloading takes the weights away.
    handles = [norm.register_forward_hook(normalise, prepend=True) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
