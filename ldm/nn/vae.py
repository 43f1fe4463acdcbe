"""The KL autoencoder of latent diffusion (Rombach et al. 2022); the defaults are Stable Diffusion's, with f = 8."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attend import attend
from ldm.nn.init import scaled
from ldm.nn.layers import Downsample, ResBlock, Upsample, activate, normalize
from ldm.nn.tiling import apply_in_tiles


class PixelAttention(nn.Module):
    """Single-head self-attention over all pixels of a feature map (b, c, h, w)."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = normalize(groups, width, 1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (scaled(nn.Linear(width, width)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (b, h·w, c)
        q, k, v = (project(pixels)[:, None] for project in (self.to_q, self.to_k, self.to_v))  # (b, 1, h·w, c)
        hidden = self.to_out(attend(q, k, v)[:, 0])  # (b, h·w, c)
        return x + hidden.transpose(1, 2).unflatten(2, x.shape[2:])  # (b, c, h, w)


class Middle(nn.Module):
    """The blocks at the lowest resolution, with attention over the entire image."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block1 = ResBlock(width, width, groups=groups, eps=1e-6)
        self.attention = PixelAttention(width, groups)
        self.block2 = ResBlock(width, width, groups=groups, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class Encoder(nn.Module):
    """Maps pixels (b, 3, H, W) to features (b, outputs, H/f, W/f)."""

    def __init__(self, widths: Sequence[int], blocks: int, outputs: int, groups: int, patch: int) -> None:
        super().__init__()
        self.patch, self.blocks = patch, blocks
        self.conv_in = scaled(nn.Conv2d(3 * patch**2, widths[0], 3, padding=1))
        layers: list[nn.Module] = []
        current = widths[0]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                layers.append(ResBlock(current, width, groups=groups, eps=1e-6))
                current = width
            if level < len(widths) - 1:
                layers.append(Downsample(current, asymmetric=True))
        self.down = nn.Sequential(*layers)
        self.middle = Middle(current, groups)
        self.norm_out = normalize(groups, current, 1e-6)
        self.conv_out = scaled(nn.Conv2d(current, outputs, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, self.patch)  # (b, 3·patch², H/patch, W/patch)
        return self.finish(self.down(self.conv_in(x)))

    def finish(self, hidden: Tensor) -> Tensor:
        """Applies the layers after the levels: the middle, which attends to the entire image, and the output layers."""
        return self.conv_out(activate(self.norm_out(self.middle(hidden))))

    def levels(self) -> list[nn.Sequential]:
        """Returns the layers before `finish`, level by level."""
        layers, size = list(self.down), self.blocks + 1
        parts = [layers[i : i + size] for i in range(0, len(layers), size)]
        parts[0] = [nn.PixelUnshuffle(self.patch), self.conv_in, *parts[0]]
        return [nn.Sequential(*part) for part in parts]


class Decoder(nn.Module):
    """Maps latents (b, inputs, h, w) to pixels (b, 3, f·h, f·w); has one more residual block per level than Encoder."""

    def __init__(self, widths: Sequence[int], blocks: int, inputs: int, groups: int, patch: int) -> None:
        super().__init__()
        self.patch, self.blocks = patch, blocks
        current = widths[-1]
        self.conv_in = scaled(nn.Conv2d(inputs, current, 3, padding=1))
        self.middle = Middle(current, groups)
        layers: list[nn.Module] = []
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                layers.append(ResBlock(current, width, groups=groups, eps=1e-6))
                current = width
            if level:
                layers.append(Upsample(current))
        self.up = nn.Sequential(*layers)
        self.norm_out = normalize(groups, current, 1e-6)
        self.conv_out = scaled(nn.Conv2d(current, 3 * patch**2, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        hidden = self.conv_out(activate(self.norm_out(self.up(self.begin(z)))))
        return F.pixel_shuffle(hidden, self.patch)

    def begin(self, z: Tensor) -> Tensor:
        """Applies the layers before the levels: the input layer and the middle, which attends to the entire image."""
        return self.middle(self.conv_in(z))

    def levels(self) -> list[nn.Sequential]:
        """Returns the layers after `begin`, level by level; upsampling belongs to the level after it."""
        layers, size = list(self.up), self.blocks + 2
        parts = [layers[max(i, 0) : i + size] for i in range(-1, len(layers), size)]
        parts[-1] += [self.norm_out, nn.SiLU(), self.conv_out, nn.PixelShuffle(self.patch)]
        return [nn.Sequential(*part) for part in parts]


class VAE(nn.Module):
    """Maps images in [-1, 1] (b, 3, H, W) to latents (b, z, H/f, W/f) of about unit variance, and back.

    f = patch · 2^(levels - 1); `patch` > 1 folds squares of pixels into channels, which is cheap for small images.

    `scale` and `shift` (one number, or one per channel) normalise latents to (mean - shift) · scale, here and nowhere
    else. `moments` are the mean and log-variance of the unscaled posterior, which caches store.

    With `tile`, images are processed one at a time, level by level, in tiles of that many pixels: this takes a fraction
    of the memory and a multiple of the time, and gives the same result up to rounding. It is for inference only.

    The layers may have another precision than images and latents; `scale` and `shift` keep that of the latents.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        widths: Sequence[int] = (128, 256, 512, 512),
        blocks: int = 2,
        latent_channels: int = 4,
        scale: float | Sequence[float] = 0.18215,
        shift: float | Sequence[float] = 0.0,
        groups: int = 32,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "widths": list(widths),
            "blocks": blocks,
            "latent_channels": latent_channels,
            "scale": scale if isinstance(scale, int | float) else list(scale),
            "shift": shift if isinstance(shift, int | float) else list(shift),
            "groups": groups,
            "patch": patch,
        }
        self.latent_channels = latent_channels
        self.factor = patch * 2 ** (len(widths) - 1)
        self.encoder = Encoder(widths, blocks, 2 * latent_channels, groups, patch)
        self.quant = scaled(nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1))
        self.quant.bias.data[latent_channels:] = -4.0  # type: ignore[union-attr]  # start with little posterior noise
        self.post_quant = scaled(nn.Conv2d(latent_channels, latent_channels, 1))
        self.decoder = Decoder(widths, blocks, latent_channels, groups, patch)
        self.register_buffer("scale", torch.tensor(scale, device="cpu").reshape(-1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift, device="cpu").reshape(-1, 1, 1), persistent=False)

    def moments(self, image: Tensor, tile: int = 0) -> Tensor:
        """Returns the mean and log-variance of the unscaled posterior (b, 2z, h, w)."""
        if image.shape[-1] % self.factor or image.shape[-2] % self.factor:
            height, width = image.shape[-2:]
            raise ValueError(
                f"the image is {height}x{width}, but its sides must be multiples of {self.factor}: resize or crop it"
            )
        x = image.to(self.quant.weight.dtype)
        features = self._encode_tiled(x, tile) if tile else self.encoder(x)
        mean, log_variance = self.quant(features).to(image.dtype).chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(-30, 20)], dim=1)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns scaled latents sampled from `moments` with standard normal `noise` (b, z, h, w), or their mean."""
        mean, log_variance = moments.chunk(2, dim=1)
        sample = mean if noise is None else mean + (log_variance / 2).exp() * noise
        return (sample - self.shift) * self.scale

    def encode(self, image: Tensor, noise: Tensor | None = None, tile: int = 0) -> Tensor:
        """Returns scaled latents (b, z, h, w) of images (b, 3, H, W); see `latents` for `noise`."""
        return self.latents(self.moments(image, tile), noise)

    def decode(self, latents: Tensor, tile: int = 0) -> Tensor:
        """Returns images (b, 3, H, W), approximately in [-1, 1]."""
        z = self.post_quant((latents / self.scale + self.shift).to(self.post_quant.weight.dtype))
        return (self._decode_tiled(z, tile) if tile else self.decoder(z)).to(latents.dtype)

    def _encode_tiled(self, image: Tensor, tile: int) -> Tensor:
        self.check_tile(tile)
        features = []
        for hidden in image.split(1):
            for level in self.encoder.levels():
                hidden = apply_in_tiles(level, hidden, tile * hidden.shape[-1] // image.shape[-1])
            features.append(self.encoder.finish(hidden))
        return torch.cat(features)

    def _decode_tiled(self, z: Tensor, tile: int) -> Tensor:
        self.check_tile(tile)
        images = []
        for latent in z.split(1):
            hidden = self.decoder.begin(latent)
            for level in self.decoder.levels():
                hidden = apply_in_tiles(level, hidden, tile * hidden.shape[-1] // (z.shape[-1] * self.factor))
            images.append(hidden)
        return torch.cat(images)

    def check_tile(self, tile: int) -> None:
        """Raises ValueError unless the tile is an integer number of latents wide."""
        if tile < 0 or tile % self.factor:
            raise ValueError(f"tile is {tile}, but must be 0, for no tiles, or a multiple of {self.factor} pixels")
