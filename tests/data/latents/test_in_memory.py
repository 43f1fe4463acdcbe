"""Latents in memory are the same moments as encoding each image individually."""

import pytest
import torch

from ldm.data.latents.in_memory import InMemory
from ldm.data.sources.shapes import Shapes


def encode(images: torch.Tensor) -> torch.Tensor:
    return images.float().mean((2, 3), keepdim=True)


def test_samples_have_their_moments_and_no_image() -> None:
    shapes = Shapes(seed=1)
    latents = InMemory(shapes, encode, count=10, batch_size=4)
    assert len(latents) == 10
    for index in range(10):
        sample, original = latents[3, index], shapes[index]
        assert "image" not in sample
        assert (sample["caption"], sample["id"]) == (original["caption"], original["id"])
        torch.testing.assert_close(sample["moments"], encode(original["image"][None])[0])


def test_a_count_of_zero_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        InMemory(Shapes(), encode, count=0)
