"""The denoising UNet of latent diffusion (Rombach et al. 2022); the defaults are Stable Diffusion 1.5's."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.nn.attention import SpatialTransformer, repeated
from ldm.nn.init import zeroed
from ldm.nn.layers import Downsample, GroupNorm, ResBlock, Upsample


def timestep_embedding(time: Tensor, width: int) -> Tensor:
    """(b,) → (b, width): cosines, then sines, of frequencies from 1 down to 1/10000 (Vaswani et al. 2017)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=time.device, dtype=torch.float32) / half)
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Stage(nn.Module):
    """One residual block and, where `depth` > 0, one spatial transformer."""

    def __init__(self, block: ResBlock, transformer: SpatialTransformer | None) -> None:
        super().__init__()
        self.block, self.transformer = block, transformer

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.block(x, time)
        return x if self.transformer is None else self.transformer(x, context)


def channels(width: int, widths: Sequence[int], blocks: int) -> tuple[list[list[int]], list[list[int]]]:
    """Inputs of every block on the way down and, from the lowest level, on the way up.

    The way down hands on the output of `conv_in`, of each block and of each downsampling; each block on the
    way up, of which every level has one more, reads the latest that is left beside its own input.
    """
    down = [[before] + [own] * (blocks - 1) for before, own in zip([width, *widths], widths, strict=False)]
    skips = [width]
    for own in widths:
        skips += [own] * (blocks + 1)
    skips.pop()  # nothing is downsampled after the last level
    up, current = [], widths[-1]
    for own in reversed(widths):
        up.append([before + skips.pop() for before in [current] + [own] * blocks])
        current = own
    return down, up


def each_level(name: str, value: int | Sequence[int], levels: int) -> list[int]:
    """One number a level; a single one stands for all. Raises ValueError for another count."""
    numbers = [value] * levels if isinstance(value, int) else list(value)
    if len(numbers) != levels:
        raise ValueError(f"a UNet of {levels} levels needs as many numbers for {name}, not {numbers}")
    return numbers


class UNet(nn.Module):
    """Noisy latents (b, in_channels, h, w), times (b,) and text (b, n, context_width) → (b, out_channels, h, w).

    Of k·b texts, entry i of x has those at i, b + i, 2b + i …, and gets k outputs; what comes before the first
    attention to text is computed once for all of them.
    `multipliers`: width of each level as a multiple of `width`; each level but the last halves the size, rounded up.
    `depth`: transformer blocks at each level, 0 for none; `middle_depth` likewise.
    `heads`: attention heads; or `head_width`, the width of one head (SD 2.x).
    `heads` and `context_width` are one number, or one a level, of which the middle has the last; where levels
    read different contexts, the call takes one a level too. `checkpointing` recomputes each stage in the
    backward pass instead of keeping what it computed.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        width: int = 320,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        depth: Sequence[int] = (1, 1, 1, 0),
        middle_depth: int = 1,
        heads: int | Sequence[int] = 8,
        head_width: int | None = None,
        context_width: int | Sequence[int] = 768,
        linear_projection: bool = False,
        groups: int = 32,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "depth": list(depth),
            "middle_depth": middle_depth,
            "heads": heads if isinstance(heads, int) else list(heads),
            "head_width": head_width,
            "context_width": context_width if isinstance(context_width, int) else list(context_width),
            "linear_projection": linear_projection,
            "groups": groups,
        }
        self.width, self.checkpointing = width, checkpointing
        levels = len(multipliers)
        widths = [width * multiplier for multiplier in multipliers]
        depths = each_level("depth", depth, levels)
        counts = _heads(heads, head_width, widths)
        contexts = each_level("context_width", context_width, levels)
        time_width = 4 * width

        def stage(inputs: int, level: int, depth: int) -> Stage:
            outputs, transformer = widths[level], None
            if depth:
                attention = counts[level], contexts[level], depth
                transformer = SpatialTransformer(outputs, *attention, groups, linear_projection)
            return Stage(ResBlock(inputs, outputs, time_width, groups), transformer)

        self.time = nn.Sequential(nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        down, up = channels(width, widths, blocks)

        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for level, inputs in enumerate(down):
            self.down.append(nn.ModuleList(stage(n, level, depths[level]) for n in inputs))
            if level < levels - 1:
                self.downsample.append(Downsample(widths[level]))

        self.middle_in = stage(widths[-1], levels - 1, middle_depth)
        self.middle_out = stage(widths[-1], levels - 1, 0)

        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, inputs in zip(reversed(range(levels)), up, strict=True):
            self.up.append(nn.ModuleList(stage(n, level, depths[level]) for n in inputs))
            if level:
                self.upsample.append(Upsample(widths[level]))

        self.norm_out = GroupNorm(groups, widths[0])
        self.conv_out = zeroed(nn.Conv2d(widths[0], out_channels, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, context: Tensor | Sequence[Tensor]) -> Tensor:
        contexts = [context] * len(self.down) if isinstance(context, Tensor) else context
        if len(contexts[0]) % len(x):
            raise ValueError(f"{len(contexts[0])} texts do not go with {len(x)} pictures: give each as many")
        embedding = self.time(timestep_embedding(time, self.width).to(x.dtype))
        hidden = self.conv_in(x)
        skips = [hidden]
        for level, stages in enumerate(self.down):
            for stage in stages:  # type: ignore[attr-defined]
                skips.append(hidden := self._run(stage, hidden, embedding, contexts[level]))
            if level < len(self.downsample):
                skips.append(hidden := self.downsample[level](hidden))

        hidden = self._run(self.middle_in, hidden, embedding, contexts[-1])
        hidden = self._run(self.middle_out, hidden, embedding, contexts[-1])

        for level, stages in enumerate(self.up):
            for stage in stages:  # type: ignore[attr-defined]
                hidden = torch.cat([hidden, repeated(skips.pop(), hidden)], dim=1)
                hidden = self._run(stage, hidden, embedding, contexts[-1 - level])
            if level < len(self.upsample):
                hidden = self.upsample[level](hidden, skips[-1].shape[2:])
        return self.conv_out(nn.functional.silu(self.norm_out(repeated(hidden, contexts[0]))))

    def _run(self, stage: nn.Module, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, x, repeated(time, x), context, use_reentrant=False)
        return stage(x, repeated(time, x), context)


def _heads(heads: int | Sequence[int], head_width: int | None, widths: list[int]) -> list[int]:
    """Attention heads at each level. Raises ValueError where a width does not split into heads of `head_width`."""
    if head_width is None:
        return each_level("heads", heads, len(widths))
    if unfit := [width for width in widths if width % head_width]:
        raise ValueError(f"a UNet of widths {widths} cannot have heads of width {head_width}: {unfit} do not split")
    return [width // head_width for width in widths]
