from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.metrics.features import RESIZES, ClipFeatures, Features, clip_features, tensorflow_bilinear
from ldm.nn.clip import CLIP, ImageTower, TextTower
from ldm.weights.native import save_network


def tower() -> ImageTower:
    torch.manual_seed(0)
    return ImageTower(16, 8, 32, 1, 2, projection=8)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_clip_features_are_the_towers_pooled_state_of_images_in_minus_one_to_one(images: Tensor) -> None:
    features = ClipFeatures(tower())
    assert torch.equal(features(images), tower().pooled(images / 127.5 - 1))
    assert features(images).shape == (4, features.num_features)


def test_images_of_another_size_are_resized(images: Tensor) -> None:
    features = ClipFeatures(tower())
    enlarged = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    plain = torch.full((1, 3, 40, 24), 51, dtype=torch.uint8)
    torch.testing.assert_close(features(plain), features(plain[:, :, :16, :16]))
    assert features(enlarged).shape == (4, 32)


def test_clip_features_load_from_a_file_of_the_image_tower_or_of_a_full_clip(images: Tensor, tmp_path: Path) -> None:
    text = TextTower(50000, 32, 1, 2, projection=8)
    both = CLIP(text, tower())
    save_network(tmp_path / "image.safetensors", "image_tower", tower().config, tower().state_dict())
    save_network(tmp_path / "clip.safetensors", "clip", both.config, both.state_dict())
    loaded = [clip_features(tmp_path / name) for name in ("image.safetensors", "clip.safetensors")]
    assert all(torch.equal(features(images), ClipFeatures(tower())(images)) for features in loaded)
    assert len({features.fingerprint for features in loaded}) == 1


class Corners(nn.Module):
    """A network whose features are the first and last value of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :, 0, 0], x[:, :, -1, -1]], dim=1)


def test_any_module_can_be_the_feature_network(images: Tensor) -> None:
    features = Features(Corners(), size=16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.1))
    expected = (images[:, :, 0, 0] / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.25, 0.1])
    torch.testing.assert_close(features(images)[:, :3], expected)
    assert features.num_features == 6 and features.about["resize"] == "bicubic"


@pytest.mark.parametrize("resize", RESIZES)
def test_resizing_keeps_a_constant_image_constant(resize: str) -> None:
    plain = torch.full((1, 3, 24, 40), 51, dtype=torch.uint8)
    torch.testing.assert_close(Features(Corners(), 16, resize)(plain), torch.full((1, 6), 51 / 127.5 - 1))


@pytest.mark.parametrize(("inside", "outside"), [(5, 8), (8, 5), (64, 299)])
def test_tensorflow_resizing_reads_pixel_i_at_i_times_the_ratio(inside: int, outside: int) -> None:
    line = torch.randn(inside, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = np.arange(outside) * inside / outside
    expected = torch.from_numpy(np.interp(places, np.arange(inside), line.numpy()))
    image = line.view(1, 1, 1, -1).expand(1, 1, inside, inside)
    found = tensorflow_bilinear(image, (outside, outside))
    expected = expected.view(1, 1, 1, -1).expand(1, 1, outside, outside)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # positions are float32, as in TensorFlow
    torch.testing.assert_close(tensorflow_bilinear(image.mT, (outside, outside)), found.mT)


def test_an_unknown_resize_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of bicubic"):
        Features(Corners(), 16, "lanczos")
