"""A diffusion transformer (Peebles & Xie 2023) that reads text by cross-attention (Chen et al. 2024, PixArt-α)."""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.nn.attention import Attention, repeated
from ldm.nn.backbone import Backbone
from ldm.nn.init import zeroed
from ldm.nn.unet import timestep_embedding


class DiTBlock(nn.Module):
    """Self-attention and a perceptron, scaled, shifted and gated by the time (adaLN-zero), and attention to the text.

    x (b, n, width), time (b, width) and text (b, m, context_width) give (b, n, width); a new block is the identity.
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
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.self_attention(self.norm1(x) * (1 + scale1) + shift1)
        x = repeated(x, text)
        x = x + self.text_attention(x, text)
        shift2, scale2, gate2 = (repeated(one, text) for one in (shift2, scale2, gate2))
        return x + gate2 * self.perceptron(self.norm2(x) * (1 + scale2) + shift2)


class DiT(Backbone):
    """Squares of `patch` latent pixels become tokens of `width` numbers, with sine-cosine position embeddings."""

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
            raise ValueError(f"the width of a DiT is {width}, but must be a multiple of 4 for its position embeddings")
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
    def multiple(self) -> int:
        return self.patch

    def repeated_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        text = self.shared(conditioning.get("text"), x)
        time = self.time(timestep_embedding(time, 256).to(x.dtype))
        hidden = self.conv_in(x)  # (b, width, h/p, w/p)
        height, width = hidden.shape[2:]
        places = position_embedding(height, width, self.width, x.device).to(x.dtype)
        hidden = hidden.flatten(2).transpose(1, 2) + places  # (b, n, width)
        for block in self.blocks:
            hidden = self.run(block, hidden, repeated(time, hidden), text)
        shift, scale = repeated(self.modulation_out(time), hidden)[:, None].chunk(2, dim=-1)
        out = self.linear_out(self.norm_out(hidden) * (1 + scale) + shift)  # (b, n, c·p²)
        return nn.functional.pixel_shuffle(out.transpose(1, 2).unflatten(2, (height, width)), self.patch)


def position_embedding(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """(h·w, channels): half of the channels embed the row, half the column, both counted from 0 to 16 at any size."""
    rows, columns = (
        timestep_embedding(torch.arange(side, device=device) * (16 / side), channels // 2) for side in (height, width)
    )
    return torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], dim=1)
