"""Convolutional layers that the UNet and the autoencoder share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.init import scaled, zeroed

LARGE = 1024  # pixels of a channels-last feature map from which PyTorch's CPU kernel sums over the batch at once


class GroupNorm(nn.GroupNorm):
    """Group normalisation whose result for an image does not depend on the batch that it is in.

    Where PyTorch's kernel would round the sums of an image differently for every batch size, images are normalised one
    at a time (without gradients only). On a GPU, whose kernel always returns the default layout, that of x is restored.

    `fused` layers, see `ldm.execution.fused_norms`, run their own kernel, which can also apply SiLU.
    """

    fused = False

    def fuses(self, x: Tensor) -> bool:
        return self.fused and x.is_contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        if self.fuses(x):
            from ldm.kernels.group_norm import group_norm

            return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu)
        if torch.compiler.is_compiling():
            return super().forward(x)
        if x.device.type != "cpu":
            out = super().forward(x)
            channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            return out.contiguous(memory_format=torch.channels_last) if channels_last else out
        if torch.is_grad_enabled():
            # Without a gradient of x the backward pass of PyTorch's CPU kernel crashes, if x is channels-last.
            crashes = self.weight.requires_grad and not x.requires_grad
            return super().forward(x.detach().requires_grad_() if crashes else x)
        if len(x) < 2 or x[0, 0].numel() < LARGE or x.is_contiguous():
            return super().forward(x)
        settings = self.num_groups, self.weight, self.bias, self.eps
        return torch.cat([F.group_norm(image, *settings) for image in x.split(1)])


class PixelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel of (b, c, h, w), which keeps the level of flat regions."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def normalize(groups: int, width: int, eps: float) -> nn.Module:
    """Returns a group normalisation, or a `PixelNorm` if `groups` is 0."""
    return GroupNorm(groups, width, eps=eps) if groups else PixelNorm(width, eps)


def activate(normalized: Tensor) -> Tensor:
    """Returns SiLU of a tensor that nothing else uses: in its memory, unless gradients need the tensor."""
    return F.silu(normalized, inplace=not torch.is_grad_enabled())


def normalize_and_activate(norm: nn.Module, x: Tensor) -> Tensor:
    """Returns SiLU of the normalised x."""
    if isinstance(norm, GroupNorm) and norm.fuses(x):
        return norm(x, silu=True)
    return activate(norm(x))


class ResBlock(nn.Module):
    """Two pre-norm 3x3 convolutions on a residual path; the time embedding, if any, is added between them."""

    def __init__(
        self, inputs: int, outputs: int, time_width: int | None = None, groups: int = 32, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = normalize(groups, inputs, eps)
        self.conv1 = scaled(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.time = nn.Linear(time_width, outputs) if time_width else None
        self.norm2 = normalize(groups, outputs, eps)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = scaled(nn.Conv2d(inputs, outputs, 1)) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        hidden = self.conv1(normalize_and_activate(self.norm1, x))
        if self.time is not None and time is not None:
            hidden = hidden + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(normalize_and_activate(self.norm2, hidden))


class Downsample(nn.Module):
    """Halves the size by a strided convolution; `asymmetric` pads right and below only, as SD's autoencoder does."""

    def __init__(self, width: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = scaled(nn.Conv2d(width, width, 3, stride=2, padding=0 if asymmetric else 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Resizes by nearest neighbour to the given size, or to twice the size, and applies a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = scaled(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
