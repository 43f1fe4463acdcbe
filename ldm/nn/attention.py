"""Self-attention over the pixels of a feature map and cross-attention to text (Rombach et al. 2022, appendix E.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attend import attend
from ldm.nn.init import zeroed
from ldm.nn.layers import GroupNorm


def repeat_batch(x: Tensor, like: Tensor) -> Tensor:
    """Repeats the batch of x (b, …) to the k·b samples of `like`, (k·b, …), and keeps its memory format."""
    return x if len(x) == len(like) else torch.cat([x] * (len(like) // len(x)))


class Attention(nn.Module):
    """Multi-head attention of x (b, n, width) to context (b, m, context_width), by default to x itself."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the attention width is {width}, but must be a multiple of the number of heads, {heads}")
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width or width, width, bias=False)
        self.to_v = nn.Linear(context_width or width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, heads, n, width / heads)
            for tensor in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))  # (b, n, width)


class FeedForward(nn.Module):
    """GEGLU and a projection back to `width` (Shazeer 2020)."""

    def __init__(self, width: int, expansion: int = 4) -> None:
        super().__init__()
        self.to_hidden = nn.Linear(width, 2 * expansion * width)
        self.to_out = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.to_hidden(x).chunk(2, dim=-1)
        return self.to_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to text and a feed-forward layer, each pre-norm and residual.

    Takes x (b, n, width) and context (k·b, m, context_width), k texts for each sample of x; returns (k·b, n, width).
    """

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, heads)
        self.text_attention = Attention(width, heads, context_width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = repeat_batch(x + self.self_attention(self.norm1(x)), context)
        x = x + self.text_attention(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (b, c, h, w), on a residual path that starts at zero.

    `linear_projection` projects after flattening, as in SD 2.x; SD 1.x projects before it, by 1x1 convolutions.
    """

    def __init__(
        self, width: int, heads: int, context_width: int, depth: int, groups: int, linear_projection: bool
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear_projection else nn.Conv2d(width, width, 1)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, context_width) for _ in range(depth))
        self.proj_out = zeroed(nn.Linear(width, width) if linear_projection else nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, hidden = x.shape[2], self.norm(x)
        if not self.linear_projection:
            hidden = self.proj_in(hidden)
        hidden = hidden.flatten(2).transpose(1, 2)  # (b, h·w, c)
        if self.linear_projection:
            hidden = self.proj_in(hidden)
        for block in self.blocks:
            hidden = block(hidden, context)
        if self.linear_projection:
            hidden = self.proj_out(hidden)
        hidden = hidden.transpose(1, 2).unflatten(2, (height, -1))  # (b, c, h, w)
        if not self.linear_projection:
            hidden = self.proj_out(hidden)
        return repeat_batch(x, hidden) + hidden
