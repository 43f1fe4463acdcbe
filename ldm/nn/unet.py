"""The denoising UNet of latent diffusion (Rombach et al. 2022); the defaults are Stable Diffusion 1.5's."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.nn.attention import SpatialTransformer, repeat_batch
from ldm.nn.backbone import Backbone
from ldm.nn.init import zeroed
from ldm.nn.layers import Downsample, GroupNorm, ResBlock, Upsample, normalize_and_activate


def timestep_embedding(time: Tensor, width: int) -> Tensor:
    """Maps times (b,) to (b, width): cosines, then sines, at frequencies from 1 to 1/10000 (Vaswani et al. 2017)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=time.device, dtype=torch.float32) / half)
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Stage(nn.Module):
    """A residual block, followed by a spatial transformer where a level has attention."""

    def __init__(self, block: ResBlock, transformer: SpatialTransformer | None) -> None:
        super().__init__()
        self.block, self.transformer = block, transformer

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.block(x, time)
        return x if self.transformer is None else self.transformer(x, context)


def channels(width: int, widths: Sequence[int], blocks: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the input channels of every block, by level: of the down path, and of the up path from the lowest level.

    The outputs of `conv_in`, of each block and of each downsampling on the down path are skip connections. Each block
    on the up path, which has one more block per level, concatenates the latest unused one to its input.
    """
    down = [[before] + [level] * (blocks - 1) for before, level in zip([width, *widths], widths, strict=False)]
    skips = [width]
    for level in widths:
        skips += [level] * (blocks + 1)
    skips.pop()  # there is no downsampling after the last level
    up, current = [], widths[-1]
    for level in reversed(widths):
        up.append([before + skips.pop() for before in [current] + [level] * blocks])
        current = level
    return down, up


def each_level(name: str, value: int | Sequence[int], levels: int) -> list[int]:
    """Returns one number per level; a single number applies to all levels. Raises ValueError for another count."""
    numbers = [value] * levels if isinstance(value, int) else list(value)
    if len(numbers) != levels:
        raise ValueError(f"{name} is {numbers}, but a UNet of {levels} levels needs {levels} numbers, or one for all")
    return numbers


class UNet(Backbone):
    """Stable Diffusion's UNet, with cross-attention to text (b, n, context_width).

    `multipliers` gives the width of each level as a multiple of `width`; each level but the last halves the size,
    rounded up. `depth` is the number of transformer blocks at each level, 0 for no attention, and `middle_depth` the
    number in the middle. `heads` is the number of attention heads, for all levels or per level; `head_width` sets the
    width of a head instead (SD 2.x). Input channels in excess of the output channels are those of the hint
    "inpainting": the mask and the latents of the masked image.
    """

    kind = "unet"

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
        context_width: int = 768,
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
            "context_width": context_width,
            "linear_projection": linear_projection,
            "groups": groups,
        }
        self.width, self.checkpointing = width, checkpointing
        levels = len(multipliers)
        widths = [width * multiplier for multiplier in multipliers]
        depths = each_level("depth", depth, levels)
        counts = _heads(heads, head_width, widths)
        time_width = 4 * width

        def stage(inputs: int, level: int, depth: int) -> Stage:
            outputs, transformer = widths[level], None
            if depth:
                attention = counts[level], context_width, depth
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

    @property
    def latent_channels(self) -> int:
        return int(self.config["out_channels"])

    @property
    def reads(self) -> dict[str, int]:
        hint = self.config["in_channels"] - self.config["out_channels"]
        return {"text": self.config["context_width"]} | ({"inpainting": hint} if hint else {})

    def repeated_blocks(self) -> list[Stage]:
        return [module for module in self.modules() if isinstance(module, Stage)]

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        text = self.text_states(conditioning, x)
        embedding = self.time(timestep_embedding(time, self.width).to(x.dtype))
        if "inpainting" in self.reads:
            hint = conditioning.get("inpainting").to(x.dtype)
            x = torch.cat([repeat_batch(x, hint), hint], dim=1)  # (b or k·b, in_channels, h, w)
        hidden = self.conv_in(x)
        skips = [hidden]
        for level, stages in enumerate(self.down):
            for stage in stages:  # type: ignore[attr-defined]
                skips.append(hidden := self._stage(stage, hidden, embedding, text))
            if level < len(self.downsample):
                skips.append(hidden := self.downsample[level](hidden))

        hidden = self._stage(self.middle_in, hidden, embedding, text)
        hidden = self._stage(self.middle_out, hidden, embedding, text)

        for level, stages in enumerate(self.up):
            for stage in stages:  # type: ignore[attr-defined]
                hidden = torch.cat([hidden, repeat_batch(skips.pop(), hidden)], dim=1)
                hidden = self._stage(stage, hidden, embedding, text)
            if level < len(self.upsample):
                hidden = self.upsample[level](hidden, skips[-1].shape[2:])
        return self.conv_out(normalize_and_activate(self.norm_out, repeat_batch(hidden, text)))

    def _stage(self, stage: nn.Module, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return self.run_block(stage, x, repeat_batch(time, x), text)


def _heads(heads: int | Sequence[int], head_width: int | None, widths: list[int]) -> list[int]:
    """Returns the number of heads at each level. Raises ValueError if a width is not a multiple of `head_width`."""
    if head_width is None:
        return each_level("heads", heads, len(widths))
    if any(width % head_width for width in widths):
        raise ValueError(f"head_width is {head_width}, but must divide the width of every level: {widths}")
    return [width // head_width for width in widths]
