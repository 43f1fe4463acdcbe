import pytest
from PIL import Image

from ldm.pipeline.input_warnings import (
    area_warnings,
    effect_warnings,
    input_warnings,
    size_warnings,
    unsupported_warnings,
)
from ldm.pipeline.inputs import ImageRequest
from ldm.pipeline.settings import Settings
from tests.tiny import tiny_text_encoder


def request(image: tuple[int, int], mask: tuple[int, int] | None = None) -> ImageRequest:
    return ImageRequest("a", "", 0, 1.0, Image.new("RGB", image), mask and Image.new("L", mask))


def test_images_and_masks_of_other_sizes_are_reported() -> None:
    assert list(size_warnings([ImageRequest("a", "", 0, 1.0), request((8, 4), (8, 4))], (4, 8))) == []
    assert list(size_warnings([request((8, 4), (6, 3))], (4, 4))) == [
        "the image is 4x8; it was scaled and cropped to the output size 4x4",
        "the mask is 3x6; it was scaled to the size of the image, 4x8",
    ]


def test_sizes_of_another_area_than_in_training_get_a_warning() -> None:
    assert not [size for size in ((64, 64), (64, 128), (128, 64), (32, 64)) if list(area_warnings(size, (64, 64)))]
    assert "16 times the area of the model's 64x64" in next(area_warnings((256, 256), (64, 64)))
    assert "repeat objects" in next(area_warnings((72, 128), (64, 64)))
    assert "1/4 of the area" in next(area_warnings((32, 32), (64, 64)))
    assert "cut objects off" in next(area_warnings((32, 32), (64, 64)))


@pytest.mark.parametrize(
    "part", ["[cat:dog:0.5]", "[dog:0.5]", "[cat:dog: 8 ]", "[cat|dog]", "AND", "<lora:ink:0.8", "< lora:ink:0.8>"]
)
def test_syntax_of_the_web_ui_that_is_not_supported_gets_a_warning(part: str) -> None:
    (warning,) = unsupported_warnings(["a cat", f"a red {part}"])
    assert warning.startswith(f"{part!r} in 'a red {part}' is read as words")


def test_supported_syntax_of_the_web_ui_gets_no_warning() -> None:
    assert not [
        *unsupported_warnings(["[cat], [[a (dog:1.2)]] BREAK and x: 5", r"\[cat|dog\]", "SAND | (a:1.2) 1 < 2"])
    ]


def test_words_on_both_sides_of_a_break_are_not_taken_for_one() -> None:
    settings = Settings(size=(64, 64), prompt_syntax="a1111", chunks=2)
    given = ImageRequest("a red circle BREAK a blue square", "", 0, 2.0)
    assert input_warnings([given], settings, tiny_text_encoder(), (64, 64)) == []


@pytest.mark.parametrize(
    ("guidance", "weak", "why"),
    [(1.0, False, "guidance=1 is no guidance"), (2.0, True, "a weak model takes its place")],
)
def test_a_negative_prompt_without_an_effect_gets_a_warning(guidance: float, weak: bool, why: str) -> None:
    (warning,) = effect_warnings([ImageRequest("a", "blue", 0, guidance), ImageRequest("a", "", 0, guidance)], weak)
    assert warning == f"the negative prompt 'blue' has no effect, because {why}"
    assert not [*effect_warnings([ImageRequest("a", "blue", 0, 2.0)], weak=False)]


def test_a_mask_that_repaints_nothing_gets_a_warning() -> None:
    dim, half = (
        ImageRequest("a", "", 0, 2.0, Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (level,) * 3))
        for level in (127, 128)
    )
    (warning,) = effect_warnings([dim, half], weak=False)
    assert warning.startswith("the mask is white nowhere")
