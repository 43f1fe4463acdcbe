"""Scaled dot-product attention, with alternatives to PyTorch's fused kernel where it is slow: in bfloat16 on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.device import has_amx

SHORT = 128  # up to this many keys, all scores are computed in one matrix product
LONG = 1024  # from this many keys on, scores are computed for one block of queries at a time,
WIDE = 40  # if heads are at least this wide
ROWS = 512  # queries per block, whose scores fit in a cache; fewer queries are not worth a block
KEY_STRIDE = 31  # one key in 31, in most feature maps from every column, predicts the largest score of a query
WIDTH_MULTIPLE = 16  # bfloat16 matrix products are fastest at multiples of this width


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax(q·kᵀ/√d)·v, (b, heads, n, d), of q (b, heads, n, d) and k, v (b, heads, m, d)."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and not torch.compiler.is_compiling():
        if k.shape[-2] <= SHORT:
            return attend_at_once(q, k, v)
        large = k.shape[-2] >= LONG and q.shape[-2] >= ROWS and q.shape[-1] >= WIDE
        if large and not torch.is_grad_enabled() and not has_amx():
            return attend_in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def attend_at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes all scores in one matrix product and their softmax in float32."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes scores for one block of queries of one head at a time.

    Scores are rounded to bfloat16, which is most precise near 0. Since a softmax does not change when all scores of a
    query are shifted, they are shifted so that the largest is about 0. The shift is one more entry of q, multiplied by
    a 1 in k, so that it is added in the float32 sum of the matrix product.
    """
    batch, heads, queries, width = q.shape
    scale, padding = width**-0.5, -(width + 1) % WIDTH_MULTIPLE
    q, v = F.pad(q, (0, 1 + padding)), F.pad(v, (0, 1 + padding))
    k = F.pad(F.pad(k, (0, 1), value=1), (0, padding))
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    scores = q.new_empty(min(ROWS, queries), k.shape[2])  # reused: allocating it per block would double the time
    probabilities = torch.empty_like(scores)
    for head in range(batch * heads):
        at = divmod(head, heads)
        for rows, into in zip(q[at].split(ROWS), out[at].split(ROWS), strict=True):
            s, p = scores[: len(rows)], probabilities[: len(rows)]
            rows[:, width] = -(rows @ k[at][::KEY_STRIDE].mT).amax(-1)
            torch.addmm(s, rows, k[at].mT, beta=0, alpha=scale, out=s)
            torch.softmax(s, -1, out=p)
            into.copy_((p @ v[at])[:, :width])
    return out
