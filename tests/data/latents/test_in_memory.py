"""Latents in memory are the same moments as encoding each image individually."""

import pytest
import torch

from ldm.data.latents.in_memory import InMemory
from ldm.data.sources.shapes import Shapes
from tests.training.tiny import Images


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


class Drawn(Images):
    """Images whose pixels and captions are those of (draw, index), in two sizes."""

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, object]:
        draw, index = key if isinstance(key, tuple) else (0, key)
        image = torch.full((3, 4 + 4 * (index % 2), 4), 10 * draw + index, dtype=torch.uint8)
        return {"image": image, "caption": f"{index % 2}", "id": index}


def test_the_kept_draws_repeat_in_order() -> None:
    latents = InMemory(Drawn(5), encode, draws=3, batch_size=4)
    for draw in range(7):
        assert [float(latents[draw, k]["moments"][0, 0, 0]) for k in range(5)] == [
            10 * (draw % 3) + k for k in range(5)
        ]


def test_without_an_encoder_the_images_are_kept() -> None:
    images = InMemory(Drawn(5), draws=2)
    assert torch.equal(images[1, 2]["image"], Drawn(5)[1, 2]["image"])  # type: ignore[arg-type]


def test_each_caption_is_encoded_once() -> None:
    seen: list[str] = []

    def states(captions: list[str]) -> torch.Tensor:
        seen.extend(captions)
        return torch.tensor([[[float(caption)]] for caption in captions])

    latents = InMemory(Drawn(5), encode, draws=2, encode_captions=states)
    assert seen == ["0", "1"]
    assert [float(latents[1, k]["states"]) for k in range(5)] == [0, 1, 0, 1, 0]
