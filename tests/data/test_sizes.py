from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from ldm.data.latents.cache import Decoded
from ldm.data.sizes import check_sizes, size_of


class SameSample(Dataset[dict[str, Any]]):
    """A data set whose samples all have a tensor of the given shape and name."""

    def __init__(self, *shape: int, name: str = "image", length: int = 2) -> None:
        self.sample, self.length = {name: torch.zeros(shape)}, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.length:
            raise IndexError(index)
        return self.sample


class NoDecoder:
    """A first stage without a network, so that decoding fails."""

    network = None
    source: dict[str, Any] = {}  # noqa: RUF012


def test_the_size_of_latents_is_the_size_of_their_images() -> None:
    images, latents = SameSample(3, 32, 48), SameSample(8, 4, 6, name="moments")
    for dataset in (images, latents, Decoded(latents, NoDecoder())):
        assert size_of(dataset, 8) == (32, 48)


def test_images_of_the_sampled_size_and_empty_data_sets_are_accepted() -> None:
    latents, empty = SameSample(8, 4, 6, name="moments"), SameSample(3, 1, 1, length=0)
    check_sizes({"images": SameSample(3, 32, 48), "latents": latents, "empty": empty}, (32, 48), 8)


@pytest.mark.parametrize("data", [SameSample(3, 64, 64), SameSample(8, 8, 8, name="moments")])
def test_images_of_another_size_are_refused_with_the_settings_to_change(data: SameSample) -> None:
    message = (
        r"images of evaluation\.reference are 64x64, but training\.size is \[32, 48\].*: set training\.size=\[64,64\]"
    )
    with pytest.raises(ValueError, match=message):
        check_sizes({"data.module.train": SameSample(3, 32, 48), "evaluation.reference": data}, (32, 48), 8)
