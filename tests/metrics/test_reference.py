from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.data.sources.shapes import Shapes
from ldm.metrics.features import Features
from ldm.metrics.provenance import image_hash
from ldm.metrics.reference import data_about, image_batches, reference

IMAGES = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
DATA = {"data": "pictures", "count": 5}


class Pixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def network(resize: str = "bicubic") -> Features:
    return Features(Pixels(), 4, resize)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    return zip(IMAGES.split(3), torch.arange(5).split(3), strict=True)


def unread() -> Iterator[tuple[Tensor, Tensor]]:
    raise AssertionError("the images were read again")
    yield


def test_features_are_read_from_their_file_without_reading_the_images(tmp_path: Path) -> None:
    computed = reference(tmp_path / "features.safetensors", network(), batches(), DATA)
    read = reference(tmp_path / "features.safetensors", network(), unread(), DATA)
    assert torch.equal(computed.features, network()(IMAGES)) and torch.equal(read.features, computed.features)
    assert read.ids.tolist() == [0, 1, 2, 3, 4]
    assert read.about == computed.about
    assert computed.about["sha256"] == f"{image_hash(IMAGES):064x}" and computed.about["size"] == [4, 4]


def test_a_file_of_other_data_or_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    reference(path, network(), batches(), DATA)
    with pytest.raises(ValueError, match="features of other data"):
        reference(path, network(), batches(), {**DATA, "count": 6})
    with pytest.raises(ValueError, match="features of another network than"):
        reference(path, network("bilinear"), batches(), DATA)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable file of reference features"):
        reference(path, network(), batches(), DATA)


def test_without_a_path_nothing_is_written() -> None:
    assert reference(None, network(), batches(), DATA).about["count"] == 5


def test_empty_data_and_images_of_several_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="reference data are empty"):
        reference(None, network(), [], DATA)
    sizes = [(torch.zeros(1, 3, n, n, dtype=torch.uint8), torch.tensor([n])) for n in (4, 8)]
    with pytest.raises(ValueError, match="several sizes"):
        reference(None, network(), sizes, DATA)


def test_images_are_batched_with_their_ids() -> None:
    shapes = Shapes(0, length=9)
    images, ids = zip(*image_batches(shapes, 7, 3), strict=True)
    assert [part.tolist() for part in ids] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(torch.cat(images)[6], shapes[6]["image"])


def test_data_are_distinguished_by_their_first_images_and_their_count() -> None:
    about = [data_about(Shapes(seed, length=9), count) for seed, count in ((0, 5), (0, 6), (1, 5), (0, 5))]
    assert about[0] == about[3] and about[0] not in about[1:3]
