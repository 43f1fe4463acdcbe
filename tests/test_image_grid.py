import numpy as np
import pytest
from PIL import Image

from ldm.image import grid

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def test_a_grid_without_captions_holds_the_pictures_row_by_row() -> None:
    images = [Image.new("RGB", (10, 10), colour) for colour in (RED, GREEN, BLUE)]
    sheet = grid(images, columns=2)
    at = [sheet.getpixel((x, y)) for y in (13, 31) for x in (13, 31)]
    assert at == [RED, GREEN, BLUE, WHITE]


def test_small_pictures_are_enlarged_without_blur_when_they_have_captions() -> None:
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    sheet = grid([image], ["a caption"])
    shown = sheet.crop((8, 8, 8 + 192, 8 + 192))
    assert np.array_equal(np.asarray(shown), np.asarray(image).repeat(3, 0).repeat(3, 1))


def dark(sheet: Image.Image, box: tuple[int, int, int, int]) -> int:
    return int((np.asarray(sheet.crop(box).convert("L")) < 128).sum())


def test_each_caption_is_drawn_under_its_own_picture_and_stays_in_its_column() -> None:
    blank = Image.new("RGB", (192, 192), WHITE)
    sheet = grid([blank] * 2, ["", "several words, long enough to fill more than one line of the column"], columns=2)
    assert dark(sheet, (0, 0, 208, sheet.height)) == 0
    assert dark(sheet, (208, 200, 400, 218)) > 50 and dark(sheet, (208, 218, 400, 236)) > 50
    assert dark(sheet, (400, 0, sheet.width, sheet.height)) == 0


def test_an_accent_that_the_font_lacks_is_left_out_instead_of_the_letter() -> None:
    blank = Image.new("RGB", (192, 192), WHITE)
    assert np.array_equal(np.asarray(grid([blank], ["café – thé"])), np.asarray(grid([blank], ["cafe - the"])))


def test_a_word_wider_than_its_column_is_broken() -> None:
    blank = Image.new("RGB", (192, 192), WHITE)
    sheet = grid([blank], ["supercalifragilisticexpialidocious" * 2])
    assert sheet.width == 208 and dark(sheet, (202, 0, 208, sheet.height)) == 0


def test_a_caption_without_end_is_cut() -> None:
    blank = Image.new("RGB", (192, 192), WHITE)
    assert grid([blank], ["word " * 500]).height == grid([blank], ["word " * 5000]).height < 400


def test_a_grid_of_nothing_or_with_captions_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="a grid needs pictures"):
        grid([])
    with pytest.raises(ValueError, match="got 1, 2"):
        grid([Image.new("RGB", (8, 8))], ["a", "b"])
