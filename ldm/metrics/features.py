"""Networks that turn pictures into features, which metrics compare instead of pixels."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.image import from_uint8
from ldm.nn.clip import CLIP, ImageTower
from ldm.weights.native import fingerprint, load_network, read_about


class ClipFeatures(nn.Module):
    """uint8 (b, 3, h, w) of any size → the pooled state of a CLIP image tower, float32 (b, num_features)."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower.float().eval().requires_grad_(False)
        self.num_features: int = tower.config["width"]
        self.fingerprint = fingerprint(tower.state_dict())

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x, size = from_uint8(images), (self.tower.size, self.tower.size)
        if x.shape[2:] != size:
            x = interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.tower.pooled(x)


def clip_features(weights: str | Path) -> ClipFeatures:
    """The features of the image tower in a file of ours, which holds it alone or with its text tower."""
    kind = read_about(weights)["kind"]
    if kind == "clip":
        return ClipFeatures(cast(CLIP, load_network(weights, "clip")).image)
    return ClipFeatures(cast(ImageTower, load_network(weights, "image_tower")))
