"""A linear or convolution layer with a low-rank change to its weight: LoRA, rsLoRA and DoRA.

The change is ΔW = scale · up · down (Hu et al. 2021); with a magnitude m, the weight is m · (W + ΔW) / ‖W + ΔW‖, the
norm taken over the inputs of each output (DoRA, Liu et al. 2024).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d


class LowRank(nn.Module):
    """`base`, frozen in its own dtype, and the factors `down` (r, in[, k, k]) and `up` (out, r[, 1, 1]) in float32.

    A new layer is the identity of its base, because `up` starts at zero. `alpha` is stored as a number of this layer;
    the scale is alpha / r, or alpha / √r if `stabilised` (rsLoRA, Kalajdzievski 2023).
    """

    def __init__(
        self,
        base: Layer,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        stabilised: bool = False,
        decomposed: bool = False,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"the rank of an adapter is {rank}, but must be 1 or more")
        self.base = base.requires_grad_(False)
        self.alpha = float(rank if alpha is None else alpha)
        self.scale = self.alpha / (rank**0.5 if stabilised else rank)
        self.dropout = dropout
        weight = base.weight
        inputs, *kernel = weight.shape[1:]
        options = {"device": weight.device, "dtype": torch.float32}
        self.down = nn.Parameter(torch.empty(rank, inputs, *kernel, **options))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, *[1] * len(kernel), **options))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.magnitude = nn.Parameter(self._norm(weight.float())) if decomposed else None

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self) -> Tensor:
        """ΔW, float32, of the shape of the base weight."""
        product = self.up.flatten(1) @ self.down.flatten(1)  # (out, in·k·k)
        return self.scale * product.view(self.base.weight.shape)

    def merged(self) -> Tensor:
        """The weight of a plain layer that computes the same, float32."""
        weight = self.base.weight.float() + self.delta()
        return weight if self.magnitude is None else self._scaled(weight)

    def forward(self, x: Tensor) -> Tensor:
        change = self._change(F.dropout(x, self.dropout, self.training))
        if self.magnitude is None:
            return self.base(x) + change
        weight = self.base.weight.detach().float() + self.delta().detach()
        factor = (self.magnitude / self._norm(weight)).to(x.dtype)  # the norm counts as constant, as in the paper (4.3)
        factor = factor.view(-1, *[1] * (x.ndim - 2)) if isinstance(self.base, nn.Conv2d) else factor
        plain = self._apply_weight(x, self.base.weight)
        out = factor * (plain + change)
        bias = self.base.bias
        return out if bias is None else out + bias.view(-1, *[1] * (x.ndim - 2) if isinstance(self.base, nn.Conv2d) else (-1,))

    def _change(self, x: Tensor) -> Tensor:
        down, up = self.down.to(x.dtype), (self.scale * self.up).to(x.dtype)
        if isinstance(self.base, nn.Linear):
            return F.linear(F.linear(x, down), up)
        return F.conv2d(self._apply_weight(x, down), up)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The base layer's operation with another weight and no bias."""
        base = self.base
        if isinstance(base, nn.Linear):
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, base.stride, base.padding, base.dilation, base.groups)

    def _norm(self, weight: Tensor) -> Tensor:
        return weight.flatten(1).norm(dim=1)

    def _scaled(self, weight: Tensor) -> Tensor:
        assert self.magnitude is not None
        return weight * (self.magnitude / self._norm(weight)).view(-1, *[1] * (weight.ndim - 1))
