from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from ldm.data.cache import Decoded
from ldm.data.sizes import check_sizes, size_of


class Of(Dataset[dict[str, Any]]):
    """Samples of one tensor, by name."""

    def __init__(self, *shape: int, name: str = "image", length: int = 2) -> None:
        self.sample, self.length = {name: torch.zeros(shape)}, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.length:
            raise IndexError(index)
        return self.sample


class NoDecoder:
    """A first stage that decodes nothing."""

    network = None
    source: dict[str, Any] = {}  # noqa: RUF012


def test_the_size_of_latents_is_that_of_their_images() -> None:
    latents = Of(8, 4, 6, name="moments")
    assert size_of(Of(3, 32, 48), 8) == size_of(latents, 8) == size_of(Decoded(latents, NoDecoder()), 8) == (32, 48)


def test_images_of_the_size_that_is_drawn_and_empty_data_sets_are_accepted() -> None:
    check_sizes({"a": Of(3, 32, 48), "b": Of(8, 4, 6, name="moments"), "c": Of(3, 1, 1, length=0)}, (32, 48), 8)


@pytest.mark.parametrize("data", [Of(3, 64, 64), Of(8, 8, 8, name="moments")])
def test_images_of_another_size_are_refused_with_the_settings_that_name_them(data: Of) -> None:
    told = (
        r"images of evaluation\.reference are 64x64, but training\.size is \[32, 48\].*: set training\.size=\[64,64\]"
    )
    with pytest.raises(ValueError, match=told):
        check_sizes({"data.module.train": Of(3, 32, 48), "evaluation.reference": data}, (32, 48), 8)
