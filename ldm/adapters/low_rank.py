"""Implements linear and convolution layers with a low-rank change of the weight: LoRA, rsLoRA and DoRA.

The change is ΔW = scale · up · down (Hu et al. 2021). With a magnitude m, the weight is m · (W + ΔW) / ‖W + ΔW‖, where
the norm is taken over the inputs of each output (DoRA, Liu et al. 2024).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.change import LowRankChange, low_rank_delta, norms, rescaling

Layer = nn.Linear | nn.Conv2d


class LowRank(nn.Module):
    """Adds trainable factors `down` (r, in[, k, k]) and `up` (out, r[, 1, 1]) in float32 to the frozen layer `base`.

    The base keeps its dtype. A new layer has exactly the outputs of its base, because `up` is zero. The scale is
    alpha / r, or alpha / √r if `stabilised` (rsLoRA, Kalajdzievski 2023); alpha defaults to r. The attribute `alpha`
    is defined so that alpha / r is this scale in both cases. `dropout` applies only to the input of the change. With
    `decomposed`, `magnitude` (out, 1[, 1, 1]) is trained too. Raises ValueError for an unsupported layer or rank.
    """

    def __init__(
        self,
        base: Layer,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        stabilised: bool = False,
        decomposed: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"the rank of an adapter is {rank!r}, but must be an integer of 1 or more")
        if isinstance(base, nn.Conv2d) and base.groups > 1:
            raise ValueError(f"a convolution of {base.groups} groups cannot be given a low-rank change: leave it out")
        self.base = base.requires_grad_(False)
        self.alpha = (rank if alpha is None else float(alpha)) * (rank**0.5 if stabilised else 1.0)
        self.dropout = dropout
        weight = base.weight
        outputs, inputs, *kernel = weight.shape
        bound = (inputs * torch.Size(kernel).numel()) ** -0.5  # the default initialisation of nn.Linear and nn.Conv2d
        down = torch.empty(rank, inputs, *kernel).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, *[1] * len(kernel), device=weight.device))
        self.magnitude = nn.Parameter(norms(weight.detach().float())) if decomposed else None

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def change(self) -> LowRankChange:
        """The current change, which shares its tensors with the layer."""
        magnitude = None if self.magnitude is None else self.magnitude.detach()
        return LowRankChange(self.down.detach(), self.up.detach(), self.alpha, magnitude)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        change = self._change(F.dropout(x, self.dropout, self.training)).to(out.dtype)
        if self.magnitude is None:
            return out + change
        weight = self.base.weight.float() + low_rank_delta(self.down.detach(), self.up.detach(), self.scale)
        # The norm is treated as a constant in the gradient, as in section 4.3 of the DoRA paper.
        factor = rescaling(self.magnitude, norms(weight))[:, 0]  # (out,), or (out, 1, 1) for a convolution
        plain = out if self.base.bias is None else out - self._bias
        # The change is added to `out`, so that a factor of 1 leaves it bit-identical.
        return out + (factor - 1).to(out.dtype) * plain + factor.to(out.dtype) * change

    @property
    def _bias(self) -> Tensor:
        assert self.base.bias is not None
        bias: Tensor = self.base.bias
        return bias[:, None, None] if isinstance(self.base, nn.Conv2d) else bias

    def _change(self, x: Tensor) -> Tensor:
        down, up = self.down.to(x.dtype), (self.scale * self.up).to(x.dtype)
        if isinstance(self.base, nn.Linear):
            return F.linear(F.linear(x, down), up)
        return F.conv2d(self.base._conv_forward(x, down, None), up)  # with the base's stride and padding
