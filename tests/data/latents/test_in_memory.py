"""Latents in memory: the same moments as encoding each picture by itself."""

import pytest
import torch

from ldm.data.latents.in_memory import InMemory
from ldm.data.sources.shapes import Shapes


def encode(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float().mean((2, 3), keepdim=True)


def test_a_sample_holds_its_moments_and_no_picture() -> None:
    shapes = Shapes(seed=1)
    latents = InMemory(shapes, encode, count=10, batch_size=4)
    assert len(latents) == 10
    for index in range(10):
        sample, original = latents[3, index], shapes[index]
        assert "image" not in sample
        assert (sample["caption"], sample["id"]) == (original["caption"], original["id"])
        torch.testing.assert_close(sample["moments"], encode(original["image"][None])[0])


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        InMemory(Shapes(), encode, count=0)
