from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.metrics.features import ClipFeatures, clip_features
from ldm.nn.clip import CLIP, ImageTower, TextTower
from ldm.weights.native import save_network


def tower() -> ImageTower:
    torch.manual_seed(0)
    return ImageTower(16, 8, 32, 1, 2, projection=8)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_they_are_the_towers_pooled_state_of_pictures_in_minus_one_to_one(images: Tensor) -> None:
    features = ClipFeatures(tower())
    assert torch.equal(features(images), tower().pooled(images / 127.5 - 1))
    assert features(images).shape == (4, features.num_features)


def test_pictures_of_another_size_are_resized(images: Tensor) -> None:
    features = ClipFeatures(tower())
    enlarged = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    plain = torch.full((1, 3, 40, 24), 51, dtype=torch.uint8)
    torch.testing.assert_close(features(plain), features(plain[:, :, :16, :16]))
    assert features(enlarged).shape == (4, 32)


def test_they_load_from_a_file_with_the_tower_alone_or_with_both(images: Tensor, tmp_path: Path) -> None:
    text = TextTower(50000, 32, 1, 2, projection=8)
    both = CLIP(text, tower())
    save_network(tmp_path / "image.safetensors", "image_tower", tower().config, tower().state_dict())
    save_network(tmp_path / "clip.safetensors", "clip", both.config, both.state_dict())
    loaded = [clip_features(tmp_path / name) for name in ("image.safetensors", "clip.safetensors")]
    assert all(torch.equal(features(images), ClipFeatures(tower())(images)) for features in loaded)
    assert len({features.fingerprint for features in loaded}) == 1
