"""The denoising UNet of latent diffusion (Rombach et al. 2022); the defaults are Stable Diffusion 1.5's."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.nn.attention import SpatialTransformer
from ldm.nn.init import zeroed
from ldm.nn.layers import Downsample, ResBlock, Upsample


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


class UNet(nn.Module):
    """Noisy latents (b, in_channels, h, w), times (b,) and text (b, n, context_width) → (b, out_channels, h, w).

    `multipliers`: width of each level as a multiple of `width`; each level but the last halves the size.
    `depth`: transformer blocks at each level, 0 for none; `middle_depth` likewise.
    `heads`: attention heads at every level; or `head_width`, the width of one head (SD 2.x).
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
        heads: int = 8,
        head_width: int | None = None,
        context_width: int = 768,
        linear_projection: bool = False,
        groups: int = 32,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if len(depth) != len(multipliers):
            raise ValueError(f"a UNet of {len(multipliers)} levels needs as many depths, not {list(depth)}")
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "depth": list(depth),
            "middle_depth": middle_depth,
            "heads": heads,
            "head_width": head_width,
            "context_width": context_width,
            "linear_projection": linear_projection,
            "groups": groups,
        }
        self.width, self.checkpointing = width, checkpointing
        time_width = 4 * width
        widths = [width * multiplier for multiplier in multipliers]

        def stage(inputs: int, outputs: int, depth: int) -> Stage:
            transformer = None
            if depth:
                n = outputs // head_width if head_width else heads
                transformer = SpatialTransformer(outputs, n, context_width, depth, groups, linear_projection)
            return Stage(ResBlock(inputs, outputs, time_width, groups), transformer)

        self.time = nn.Sequential(nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)

        current, skips = width, [width]
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for level, outputs in enumerate(widths):
            stages = nn.ModuleList()
            for _ in range(blocks):
                stages.append(stage(current, outputs, depth[level]))
                skips.append(current := outputs)
            self.down.append(stages)
            if level < len(widths) - 1:
                self.downsample.append(Downsample(current))
                skips.append(current)

        self.middle_in = stage(current, current, middle_depth)
        self.middle_out = stage(current, current, 0)

        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, outputs in reversed(list(enumerate(widths))):
            stages = nn.ModuleList()
            for _ in range(blocks + 1):
                stages.append(stage(current + skips.pop(), outputs, depth[level]))
                current = outputs
            self.up.append(stages)
            if level:
                self.upsample.append(Upsample(current))

        self.norm_out = nn.GroupNorm(groups, current)
        self.conv_out = zeroed(nn.Conv2d(current, out_channels, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        embedding = self.time(timestep_embedding(time, self.width).to(x.dtype))
        hidden = self.conv_in(x)
        skips = [hidden]
        for level, stages in enumerate(self.down):
            for stage in stages:  # type: ignore[attr-defined]
                skips.append(hidden := self._run(stage, hidden, embedding, context))
            if level < len(self.downsample):
                skips.append(hidden := self.downsample[level](hidden))

        hidden = self._run(self.middle_in, hidden, embedding, context)
        hidden = self._run(self.middle_out, hidden, embedding, context)

        for level, stages in enumerate(self.up):
            for stage in stages:  # type: ignore[attr-defined]
                hidden = self._run(stage, torch.cat([hidden, skips.pop()], dim=1), embedding, context)
            if level < len(self.upsample):
                hidden = self.upsample[level](hidden, skips[-1].shape[2:])
        return self.conv_out(nn.functional.silu(self.norm_out(hidden)))

    def _run(self, stage: nn.Module, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, x, time, context, use_reentrant=False)
        return stage(x, time, context)
