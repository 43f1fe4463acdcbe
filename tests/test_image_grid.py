import numpy as np
import pytest
from PIL import Image

from ldm.image import grid

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def test_a_grid_without_captions_has_the_images_row_by_row() -> None:
    images = [Image.new("RGB", (10, 10), colour) for colour in (RED, GREEN, BLUE)]
    sheet = grid(images, columns=2)
    colours = [sheet.getpixel((x, y)) for y in (13, 31) for x in (13, 31)]
    assert colours == [RED, GREEN, BLUE, WHITE]


def test_small_images_with_captions_are_enlarged_without_interpolation() -> None:
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    sheet = grid([image], ["a caption"])
    shown = sheet.crop((8, 8, 8 + 192, 8 + 192))
    assert np.array_equal(np.asarray(shown), np.asarray(image).repeat(3, 0).repeat(3, 1))


def dark_pixels(sheet: Image.Image, box: tuple[int, int, int, int]) -> int:
    return int((np.asarray(sheet.crop(box).convert("L")) < 128).sum())


def test_each_caption_is_below_its_image_and_within_its_column() -> None:
    blank = Image.new("RGB", (192, 192), WHITE)
    sheet = grid([blank] * 2, ["", "several words, long enough to fill more than one line of the column"], columns=2)
    assert dark_pixels(sheet, (0, 0, 208, sheet.height)) == 0
    assert dark_pixels(sheet, (208, 200, 400, 218)) > 50 and dark_pixels(sheet, (208, 218, 400, 236)) > 50
    assert dark_pixels(sheet, (400, 0, sheet.width, sheet.height)) == 0


def test_accented_letters_are_shown_without_their_accents() -> None:
    blank = Image.new("RGB", (192, 192), WHITE)
    assert np.array_equal(np.asarray(grid([blank], ["café – thé"])), np.asarray(grid([blank], ["cafe - the"])))


def test_a_word_wider_than_its_column_is_wrapped() -> None:
    blank = Image.new("RGB", (192, 192), WHITE)
    sheet = grid([blank], ["supercalifragilisticexpialidocious" * 2])
    assert sheet.width == 208 and dark_pixels(sheet, (202, 0, 208, sheet.height)) == 0


def test_a_long_caption_is_truncated() -> None:
    blank = Image.new("RGB", (192, 192), WHITE)
    assert grid([blank], ["word " * 500]).height == grid([blank], ["word " * 5000]).height < 400


def test_a_grid_without_images_or_with_missing_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="a grid needs at least one image"):
        grid([])
    with pytest.raises(ValueError, match="got 1 images and 2 captions"):
        grid([Image.new("RGB", (8, 8))], ["a", "b"])
