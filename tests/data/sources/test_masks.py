"""Loss masks come from a file or the alpha channel, and are cropped and flipped like the image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.sources.folder import Folder


def ramp(width: int, height: int) -> np.ndarray:
    """Values that increase from left to right, 1 to 255."""
    return np.tile(np.linspace(1, 255, width).round().astype(np.uint8), (height, 1))


def save(root: Path, name: str, pixels: np.ndarray) -> None:
    root.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(root / name)


def folder(root: Path, **how: object) -> Folder:
    return Folder(root, 8, caption="a dog", masks=True, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["file", "alpha"])
def test_a_mask_is_cropped_and_flipped_like_its_image(place: str, tmp_path: Path) -> None:
    grey = ramp(24, 8)
    if place == "file":
        save(tmp_path, "a.png", np.dstack([grey] * 3))
        save(tmp_path, "a.mask.png", grey)
    else:
        save(tmp_path, "a.png", np.dstack([np.full_like(grey, 255)] * 3 + [grey]))
    data = folder(tmp_path, crop="random", flip=0.5, background=(0, 0, 0))
    assert len(data) == 1
    samples = [data[draw, 0] for draw in range(20)]
    for sample in samples:
        assert (sample["mask"].int() - sample["image"][:1].int()).abs().max() <= 1
    assert len({int(sample["mask"][0, 0, 0]) for sample in samples}) > 3


def test_an_image_without_a_mask_counts_in_full(tmp_path: Path) -> None:
    save(tmp_path, "a.png", np.dstack([ramp(8, 8)] * 4))
    save(tmp_path, "b.png", np.dstack([ramp(8, 8)] * 3))
    assert torch.equal(folder(tmp_path)[1]["mask"], torch.full((1, 8, 8), 255, dtype=torch.uint8))


def test_masks_without_any_mask_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "a.png", np.dstack([ramp(8, 8)] * 3))
    with pytest.raises(ValueError, match=r"data\.masks=true, but no image in .* has an alpha channel"):
        folder(tmp_path)


@pytest.mark.parametrize(
    ("mask", "message"),
    [(np.zeros((8, 8), np.uint8), "leaves nothing of the cropped image"), (ramp(9, 8), "is 9x8 and its image 8x8")],
)
def test_a_mask_that_cannot_be_used_is_refused(mask: np.ndarray, message: str, tmp_path: Path) -> None:
    save(tmp_path, "a.png", np.dstack([ramp(8, 8)] * 3))
    save(tmp_path, "a.mask.png", mask)
    with pytest.raises(ValueError, match=message):
        folder(tmp_path)[0]


@pytest.mark.parametrize("name", ["b.mask.png", "a.mask.PNG", "a.png.mask.png"])
def test_a_mask_that_belongs_to_no_image_is_refused(name: str, tmp_path: Path) -> None:
    save(tmp_path, "a.png", np.dstack([ramp(8, 8)] * 4))
    save(tmp_path, name, ramp(8, 8))
    with pytest.raises(ValueError, match=rf"1 masks in .* belong to no image, such as {name}: the mask of NAME\.jpg"):
        folder(tmp_path)
