"""Networks that map images to features, which the metrics compare instead of pixels."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.image import from_uint8
from ldm.nn.clip import ImageTower
from ldm.weights.native import fingerprint
from ldm.weights.parts import image_encoder

HALF = (0.5, 0.5, 0.5)


def tensorflow_bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes like TensorFlow 1's bilinear: output pixel i is at i · (in / out), and downscaling skips pixels."""
    for dim, length in ((2, size[0]), (3, size[1])):
        place = torch.arange(length, device=x.device, dtype=torch.float32) * (x.shape[dim] / length)  # float32 as in TF
        left = place.floor().long()
        right = (left + 1).clamp(max=x.shape[dim] - 1)
        shape = [-1 if d == dim else 1 for d in range(4)]
        x = x.index_select(dim, left).lerp(x.index_select(dim, right), (place - left).to(x.dtype).view(shape))
    return x


RESIZES: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "bicubic": lambda x, size: interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1),
    "bilinear": partial(interpolate, mode="bilinear", antialias=True),
    "bilinear without antialiasing": partial(interpolate, mode="bilinear"),  # as pytorch-fid
    "tensorflow": tensorflow_bilinear,
}


class Features(nn.Module):
    """Maps images uint8 (b, 3, h, w) of any size to features float32 (b, num_features) of any network.

    The network reads float (b, 3, size, size), normalised with `mean` and `std` that are given for values in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        size: int,
        resize: str = "bicubic",
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
    ) -> None:
        super().__init__()
        if resize not in RESIZES:
            raise ValueError(f"features.resize is {resize!r}, but must be one of {', '.join(RESIZES)}")
        self.network = network.float().eval().requires_grad_(False)
        self.size, self.resize = size, resize
        self.register_buffer("mean", 2 * torch.tensor(mean).view(3, 1, 1) - 1, persistent=False)
        self.register_buffer("std", 2 * torch.tensor(std).view(3, 1, 1), persistent=False)
        self.normalisation = {"mean": list(mean), "std": list(std)}
        self.fingerprint = fingerprint(network.state_dict())
        self.num_features: int = self(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]

    @property
    def about(self) -> dict[str, Any]:
        """Everything that determines the features, as plain data."""
        names = {"network": type(self.network).__name__, "fingerprint": self.fingerprint}
        return {**names, "resize": self.resize, "size": self.size, **self.normalisation}

    def prepare(self, images: Tensor) -> Tensor:
        """Resizes and normalises images uint8 (b, 3, h, w) for the network."""
        x = from_uint8(images)
        if x.shape[2:] != (size := (self.size, self.size)):
            x = RESIZES[self.resize](x, size)
        return (x - self.mean) / self.std

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.prepare(images)).float()


class ClipFeatures(Features):
    """The pooled state of a CLIP image tower."""

    network: ImageTower

    def __init__(
        self, tower: ImageTower, mean: Sequence[float] = HALF, std: Sequence[float] = HALF, resize: str = "bicubic"
    ) -> None:
        super().__init__(tower, tower.size, resize, mean, std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network.pooled(self.prepare(images))

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Returns the images' embeddings (b, p) in the space that they share with captions."""
        return self.network.embed(self.prepare(images))


def clip_features(weights: str | Path) -> ClipFeatures:
    """Loads the image tower of the CLIP at a path, in any layout that `ldm.weights.recognise` reads."""
    encoder = image_encoder(str(weights))
    return ClipFeatures(encoder.network, encoder.pixels.mean, encoder.pixels.std)
