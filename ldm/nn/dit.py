"""A diffusion transformer (DiT, Peebles & Xie 2023) with cross-attention to text (PixArt-α, Chen et al. 2024)."""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.nn.attention import Attention, repeat_batch
from ldm.nn.backbone import Backbone
from ldm.nn.init import zeroed
from ldm.nn.unet import timestep_embedding


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to text and an MLP; the time modulates the first and the last (adaLN-zero).

    Takes x (b, n, width), time (b, width) and text (k·b, m, context_width); returns (k·b, n, width). A new block is
    the identity.
    """

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.self_attention = Attention(width, heads)
        self.text_attention = Attention(width, heads, context_width)
        zeroed(self.text_attention.to_out)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = zeroed(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, dim=-1)  # (b, 1, width)
        x = x + gate1 * self.self_attention(self.norm1(x) * (1 + scale1) + shift1)
        x = repeat_batch(x, text)
        x = x + self.text_attention(x, text)
        shift2, scale2, gate2 = (repeat_batch(part, text) for part in (shift2, scale2, gate2))
        return x + gate2 * self.perceptron(self.norm2(x) * (1 + scale2) + shift2)


class DiT(Backbone):
    """A diffusion transformer: each patch×patch square of latent pixels becomes one token, with a sine-cosine
    position embedding."""

    kind = "dit"

    def __init__(
        self,
        channels: int = 4,
        width: int = 384,
        layers: int = 12,
        heads: int = 6,
        patch: int = 2,
        context_width: int = 768,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"the width of a DiT is {width}, but must be a multiple of 4 for its position embedding")
        self.config: dict[str, Any] = {
            "channels": channels,
            "width": width,
            "layers": layers,
            "heads": heads,
            "patch": patch,
            "context_width": context_width,
        }
        self.width, self.patch, self.checkpointing = width, patch, checkpointing
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.conv_in = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, context_width) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = zeroed(nn.Linear(width, 2 * width))
        self.linear_out = zeroed(nn.Linear(width, channels * patch**2))

    @property
    def latent_channels(self) -> int:
        return int(self.config["channels"])

    @property
    def reads(self) -> dict[str, int]:
        return {"text": self.config["context_width"]}

    @property
    def size_multiple(self) -> int:
        return self.patch

    def repeated_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        text = self.text_states(conditioning, x)
        time = self.time(timestep_embedding(time, 256).to(x.dtype))
        hidden = self.conv_in(x)  # (b, width, h/p, w/p)
        height, width = hidden.shape[2:]
        positions = position_embedding(height, width, self.width, x.device).to(x.dtype)
        hidden = hidden.flatten(2).transpose(1, 2) + positions  # (b, n, width)
        for block in self.blocks:
            hidden = self.run_block(block, hidden, repeat_batch(time, hidden), text)
        shift, scale = repeat_batch(self.modulation_out(time), hidden)[:, None].chunk(2, dim=-1)
        out = self.linear_out(self.norm_out(hidden) * (1 + scale) + shift)  # (k·b, n, c·p²)
        out = out.transpose(1, 2).unflatten(2, (height, width))  # (k·b, c·p², h/p, w/p)
        return nn.functional.pixel_shuffle(out, self.patch)


def position_embedding(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Returns (h·w, channels): half of the channels embed the row, half the column, both scaled to [0, 16)."""
    rows, columns = (
        timestep_embedding(torch.arange(side, device=device) * (16 / side), channels // 2) for side in (height, width)
    )
    return torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], dim=1)
