"""Group normalisation of channels-last feature maps, optionally followed by SiLU, forward and backward.

Each element is read twice and written once per pass, in its own dtype, where PyTorch's operations under autocast
convert to float32, change the layout and apply SiLU separately. Sums are float32 and in a fixed order. Statistics of
tiles are combined as by Chan et al. (1979), which does not subtract large numbers as E[x²] - E[x]² does.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64  # pixels and channels of a tile, which one program processes
TILES = 64  # whose statistics one program combines at a time


@triton.jit
def _tile(pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the offsets (rows, columns) of this program's tile, which of them exist, and its channels."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    pixel = tl.program_id(2).to(tl.int64) * pixels + row
    exists = (row < pixels)[:, None] & (column < channels)[None, :]
    return pixel[:, None] * channels + column[None, :], exists, column


@triton.jit
def _store_sums(out, sums, column, channels):
    """Stores what a tile's columns sum to in `out` (images, tiles of rows, channels)."""
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out + tile * channels + column, sums, mask=column < channels)


@triton.jit
def _moments(x, means, squares, pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Computes the mean and the sum of squared deviations of each channel in a tile."""
    at, exists, column = _tile(pixels, channels, ROWS, COLUMNS)
    values = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / tl.minimum(pixels - tl.program_id(0) * ROWS, ROWS)
    deviations = tl.where(exists, values - mean[None, :], 0.0)
    _store_sums(means, mean, column, channels)
    _store_sums(squares, tl.sum(deviations * deviations, 0), column, channels)


@triton.jit
def _of_group(start, tiles, pixels, channels, groups, ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """Returns the offsets (tiles, channels) of a group's sums from tile `start`, which exist, and the tiles' pixels."""
    width = channels // groups
    tile, column = start + tl.arange(0, TILES), tl.arange(0, WIDTH)
    exists = (tile < tiles)[:, None] & (column < width)[None, :]
    row = (tl.program_id(0) * tiles + tile)[:, None]
    count = tl.minimum(pixels - tile * ROWS, ROWS).to(tl.float32)[:, None]
    return row * channels + tl.program_id(1) * width + column[None, :], exists, count


@triton.jit
def _combine(
    means, squares, mean, scale, pixels, channels, groups, tiles, eps,
    ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Computes the mean and 1 / standard deviation of a group from its tiles."""
    number = pixels * (channels // groups) * 1.0
    first, second = tl.zeros((TILES, WIDTH), tl.float32), tl.zeros((TILES, WIDTH), tl.float32)
    for start in range(0, tiles, TILES):
        at, exists, count = _of_group(start, tiles, pixels, channels, groups, ROWS, TILES, WIDTH)
        first += tl.load(means + at, mask=exists, other=0.0) * count
    center = tl.sum(first) / number
    for start in range(0, tiles, TILES):
        at, exists, count = _of_group(start, tiles, pixels, channels, groups, ROWS, TILES, WIDTH)
        between = tl.load(means + at, mask=exists, other=0.0) - center
        second += tl.where(exists, tl.load(squares + at, mask=exists, other=0.0) + count * between * between, 0.0)
    at = tl.program_id(0) * groups + tl.program_id(1)
    tl.store(mean + at, center)
    tl.store(scale + at, 1.0 / tl.sqrt(tl.sum(second) / number + eps))


@triton.jit
def _normalized(x, mean, scale, at, exists, column, channels, groups):
    """Returns the normalised values of a tile and the scale of its channels, both float32."""
    inside = column < channels
    group = tl.program_id(2) * groups + column // (channels // groups)
    center, factor = tl.load(mean + group, mask=inside, other=0.0), tl.load(scale + group, mask=inside, other=0.0)
    values = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    return (values - center[None, :]) * factor[None, :], factor


@triton.jit
def _affine(weight, bias, column, channels):
    inside = column < channels
    slope = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    return slope, tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _apply(
    out, x, weight, bias, mean, scale, pixels, channels, groups,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at, exists, column = _tile(pixels, channels, ROWS, COLUMNS)
    normalized, _ = _normalized(x, mean, scale, at, exists, column, channels, groups)
    slope, shift = _affine(weight, bias, column, channels)
    values = normalized * slope[None, :] + shift[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _gradient_before_silu(gradient, normalized, slope, shift, at, exists, SILU: tl.constexpr):
    incoming = tl.load(gradient + at, mask=exists, other=0.0).to(tl.float32)
    if SILU:
        values = normalized * slope[None, :] + shift[None, :]
        gate = tl.sigmoid(values)
        incoming = incoming * gate * (1.0 + values * (1.0 - gate))
    return incoming


@triton.jit
def _gradient_sums(
    first, second, gradient, x, weight, bias, mean, scale, pixels, channels, groups,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes for each channel in a tile the sums of dz and of dz times the normalised input; z is before SiLU."""
    at, exists, column = _tile(pixels, channels, ROWS, COLUMNS)
    normalized, _ = _normalized(x, mean, scale, at, exists, column, channels, groups)
    slope, shift = _affine(weight, bias, column, channels)
    dz = _gradient_before_silu(gradient, normalized, slope, shift, at, exists, SILU)
    _store_sums(first, tl.sum(dz, 0), column, channels)
    _store_sums(second, tl.sum(dz * normalized, 0), column, channels)


@triton.jit
def _input_gradient(
    out, gradient, x, weight, bias, mean, scale, first, second, pixels, channels, groups,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes dx from dz; `first` and `second` (images, groups) are the means of dz·w and of dz·w·normalised."""
    at, exists, column = _tile(pixels, channels, ROWS, COLUMNS)
    normalized, factor = _normalized(x, mean, scale, at, exists, column, channels, groups)
    slope, shift = _affine(weight, bias, column, channels)
    dz = _gradient_before_silu(gradient, normalized, slope, shift, at, exists, SILU)
    group = tl.program_id(2) * groups + column // (channels // groups)
    inside = column < channels
    a, b = tl.load(first + group, mask=inside, other=0.0), tl.load(second + group, mask=inside, other=0.0)
    dx = (dz * slope[None, :] - a[None, :] - normalized * b[None, :]) * factor[None, :]
    tl.store(out + at, dx.to(out.dtype.element_ty), mask=exists)


class _Sizes:
    """The sizes of x (b, c, h, w) in channels-last layout, and the programs for its tiles."""

    def __init__(self, x: Tensor) -> None:
        images, self.channels, height, width = x.shape
        self.pixels = height * width
        self.programs = triton.cdiv(self.pixels, ROWS), triton.cdiv(self.channels, COLUMNS), images

    def sums(self, x: Tensor) -> Tensor:
        """Returns an empty tensor for sums over the pixels of tiles, float32 (b, tiles, c)."""
        return x.new_empty(self.programs[2], self.programs[0], self.channels, dtype=torch.float32)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        sizes = _Sizes(x)
        tiles, _, images = sizes.programs
        means, squares = sizes.sums(x), sizes.sums(x)
        _moments[sizes.programs](x, means, squares, sizes.pixels, sizes.channels, ROWS, COLUMNS)
        mean, scale = (x.new_empty(images, groups, dtype=torch.float32) for _ in range(2))
        width = triton.next_power_of_2(sizes.channels // groups)
        _combine[images, groups](
            means, squares, mean, scale, sizes.pixels, sizes.channels, groups, tiles, eps, ROWS, TILES, width
        )
        out = torch.empty_like(x)
        _apply[sizes.programs](
            out, x, weight, bias, mean, scale, sizes.pixels, sizes.channels, groups, silu, ROWS, COLUMNS
        )
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.groups, ctx.silu = groups, silu
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        sizes = _Sizes(x)
        rest = sizes.pixels, sizes.channels, ctx.groups, ctx.silu, ROWS, COLUMNS
        known = gradient, x, weight, bias, mean, scale
        tiles = sizes.sums(x), sizes.sums(x)
        _gradient_sums[sizes.programs](*tiles, *known, *rest)
        sums = torch.stack([one.sum(1) for one in tiles])  # (2, b, c)
        grouped = (sums * weight.float()).unflatten(-1, (ctx.groups, -1))
        first, second = grouped.sum(-1) / (sizes.pixels * grouped.shape[-1])  # (b, groups) each
        dx = torch.empty_like(x)
        _input_gradient[sizes.programs](dx, *known, first.contiguous(), second.contiguous(), *rest)
        dbias, dweight = sums.sum(1)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """Returns the normalised x (b, c, h, w), which must be channels-last, after SiLU if `silu`; in x's dtype."""
    with torch.cuda.device_of(x):  # Triton starts kernels on the current one; autograd sets it itself
        return _GroupNorm.apply(x, weight, bias, groups, eps, silu)
