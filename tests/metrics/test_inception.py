from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.metrics.inception import Inception, Mixed, inception_features, mixed_6a, mixed_7


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in the layout and format of the released file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(Inception().state_dict(), path)
    return path


def open_only(block: Mixed, name: str) -> None:
    """Sets convolution `name` to copy its first input channel to every output, and all others to return zeros."""
    for child, conv in block.named_children():
        conv.bn.reset_running_stats()
        nn.init.zeros_(conv.conv.weight)
        if child == name:
            kernel = conv.conv.kernel_size
            conv.conv.weight.data[:, 0, kernel[0] // 2, kernel[1] // 2] = (1 + conv.bn.eps) ** 0.5
    block.eval()


@pytest.mark.parametrize("pool", ["average", "maximum"])
def test_pooling_excludes_the_padding(pool: str) -> None:
    block = mixed_7(8, pool)
    open_only(block, "branch_pool")
    x = torch.rand(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    found = block(x)[0, -1]
    for row, column in ((0, 0), (0, 2), (3, 3), (1, 2)):
        near = x[0, 0, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        expected = near.mean() if pool == "average" else near.max()
        assert found[row, column].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_block_that_halves_the_size_pools_and_convolves_without_padding() -> None:
    block = mixed_6a(8)
    open_only(block, "branch3x3")
    x = torch.rand(1, 8, 7, 7, generator=torch.Generator().manual_seed(0))
    out = block(x)
    assert out.shape == (1, 384 + 96 + 8, 3, 3)
    torch.testing.assert_close(out[0, 0], x[0, 0, 1:-1:2, 1:-1:2])
    assert out[0, -8, 0, 0] == x[0, 0, :3, :3].max()


def test_parameter_count_is_inception_v3_with_1008_classes_and_no_auxiliary_head() -> None:
    with torch.device("meta"):
        network = Inception()
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 - 1000 * 2049 + 1008 * 2049
    assert network.state_dict()["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert network.state_dict()["Mixed_6c.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)


def test_weights_in_the_released_layout_load_and_give_2048_features(weights: Path) -> None:
    features = inception_features(weights)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = features(images)
    assert found.shape == (2, features.num_features) == (2, 2048)
    assert features.about["resize"] == "tensorflow"
    assert features.network.logits(found).shape == (2, 1008)


def test_pixels_are_normalised_to_minus_one_to_one_as_in_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.metrics.features import Features

    class Pixels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    level = [128 / 255] * 3
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = Features(Pixels(), 16, "tensorflow", level, level)(images)
    torch.testing.assert_close(found, (images.float().flatten(1) - 128) / 128, atol=1e-6, rtol=0)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Inception weights .*none.pth not found"):
        inception_features(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("nothing")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        inception_features(tmp_path / "text.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="do not match the expected Inception"):
        inception_features(tmp_path / "other.pth")
