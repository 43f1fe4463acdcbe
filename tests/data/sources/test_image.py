import io

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.sources.image import Framing, draw_and_index
from ldm.image import WHITE, load_image, pixels
from tests.data.tars import image_file


def framing(size: int = 8, crop: str = "center", flip: float = 0.0, seed: int = 0) -> Framing:
    return Framing(size, WHITE, crop, flip, seed)  # type: ignore[arg-type]


def ramp(width: int = 64) -> bytes:
    """Returns an image that is darker on the left, so that mirror images and crops differ."""
    file = io.BytesIO()
    Image.fromarray(np.tile(np.arange(width, dtype=np.uint8) * 3, (8, 1))).save(file, "PNG")
    return file.getvalue()


def test_without_crop_and_flip_the_pixels_are_those_of_the_file() -> None:
    data = image_file(9, (8, 8))
    assert torch.equal(framing()(data, "", "a", 0, 0), pixels(load_image(data)))


def test_crops_and_flips_depend_only_on_seed_id_and_draw() -> None:
    cut = framing(crop="random", flip=0.5, seed=3)
    first = [cut(ramp(), "", "a", id, draw) for id in range(4) for draw in range(4)]
    np.random.seed(1)
    torch.manual_seed(1)
    again = [
        framing(crop="random", flip=0.5, seed=3)(ramp(), "x", "b", id, draw) for id in range(4) for draw in range(4)
    ]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("changed", ["seed", "id", "draw"])
def test_crops_and_flips_differ_between_seeds_ids_and_draws(changed: str) -> None:
    given = [{"seed": 0, "id": 0, "draw": 0} | {changed: k} for k in range(40)]
    got = [framing(crop="random", flip=0.5, seed=g["seed"])(ramp(), "", "a", g["id"], g["draw"]) for g in given]
    rises = [bool(x[0, 0, 0] < x[0, 0, -1]) for x in got]
    assert len({x[0, 0].min().item() for x in got}) > 15
    assert 8 < sum(rises) < 32


def test_random_crops_cover_the_image_and_centre_crops_its_middle() -> None:
    lefts = [int(framing(crop="random")(ramp(), "", "a", id, 0)[0, 0, 0]) // 3 for id in range(600)]
    assert set(lefts) == set(range(64 - 8 + 1))
    assert int(framing()(ramp(), "", "a", 5, 5)[0, 0, 0]) // 3 == (64 - 8) // 2


@pytest.mark.parametrize(
    "caption", ["man facing right", "LEFT luggage", "left-pointing glass", "rightwards hand", "(right)", "to_left_of"]
)
def test_a_caption_that_names_a_side_is_never_flipped(caption: str) -> None:
    x = framing(flip=1.0)(ramp(), caption, "a", 0, 0)
    assert torch.equal(x, framing()(ramp(), "", "a", 0, 0))


@pytest.mark.parametrize("caption", ["a bright copyright sign", "cleft", "", "upright piano", "leftovers"])
def test_other_captions_are_flipped(caption: str) -> None:
    x = framing(flip=1.0)(ramp(), caption, "a", 0, 0)
    assert torch.equal(x, framing()(ramp(), "", "a", 0, 0).flip(-1))


def test_the_share_of_flipped_images_is_the_setting() -> None:
    flipped = [bool(framing(flip=0.2)(ramp(), "", "a", id, 0)[0, 0, 0] > 100) for id in range(400)]
    assert abs(sum(flipped) / 400 - 0.2) < 0.08  # four standard deviations


def test_flips_and_crops_are_independent() -> None:
    plain = framing(crop="random")(ramp(), "", "a", 7, 1)
    assert torch.equal(framing(crop="random", flip=1.0)(ramp(), "", "a", 7, 1), plain.flip(-1))


@pytest.mark.parametrize("wrong", [{"size": 0}, {"crop": "centre"}, {"flip": 1.5}, {"flip": -0.1}, {"seed": -1}])
def test_an_invalid_setting_is_refused_with_its_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        framing(**wrong)


def test_an_unreadable_image_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match=r"^k in x\.tar cannot be read"):
        framing()(b"no image", "", "k in x.tar", 0, 0)


def test_an_index_without_a_draw_is_draw_0() -> None:
    assert draw_and_index(3, 4) == (0, 3) and draw_and_index((7, 3), 4) == (7, 3)


@pytest.mark.parametrize("index", [4, -1, (0, 4)])
def test_an_index_out_of_range_raises_an_index_error(index: int | tuple[int, int]) -> None:
    with pytest.raises(IndexError):
        draw_and_index(index, 4)
