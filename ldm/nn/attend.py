"""softmax(q·kᵀ/√d)·v: by torch's fused kernel or, in bfloat16 on a CPU where that is slow, by matrix products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.device import has_amx

SHORT = 128  # keys at most, for all scores at once
LONG = 1024  # keys at least, for a block of scores at a time
WIDE = 40  # of a head, at least, for the same
ROWS = 512  # queries to a block, and at least; their scores fit a cache
SAMPLE = 31  # one key in so many, in most pictures from all columns, gives a guess of a query's largest score
LANE = 16  # widths that matrix products in bfloat16 like are multiples of it


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of q (b, heads, n, d) and k, v (b, heads, m, d); (b, heads, n, d)."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and not torch.compiler.is_compiling():
        if k.shape[-2] <= SHORT:
            return whole(q, k, v)
        large = k.shape[-2] >= LONG and q.shape[-2] >= ROWS and q.shape[-1] >= WIDE
        if large and not torch.is_grad_enabled() and not has_amx():
            return in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All scores at once, the softmax in float32."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A block of queries of one head at a time.

    Scores are rounded to bfloat16, which is finest near 0. A softmax does not change when a query's scores are shifted,
    so they are shifted to have about 0 as their largest, by one more entry in q and k: the product sums in float32.
    """
    batch, heads, queries, width = q.shape
    scale, padding = width**-0.5, -(width + 1) % LANE
    q, v = F.pad(q, (0, 1 + padding)), F.pad(v, (0, 1 + padding))
    k = F.pad(F.pad(k, (0, 1), value=1), (0, padding))
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    scores = q.new_empty(min(ROWS, queries), k.shape[2])  # memory that is new for every block would cost as much again
    shares = torch.empty_like(scores)
    for head in range(batch * heads):
        at = divmod(head, heads)
        for rows, into in zip(q[at].split(ROWS), out[at].split(ROWS), strict=True):
            s, p = scores[: len(rows)], shares[: len(rows)]
            rows[:, width] = -(rows @ k[at][::SAMPLE].mT).amax(-1)
            torch.addmm(s, rows, k[at].mT, beta=0, alpha=scale, out=s)
            torch.softmax(s, -1, out=p)
            into.copy_((p @ v[at])[:, :width])
    return out
