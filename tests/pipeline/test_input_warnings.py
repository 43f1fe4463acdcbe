from PIL import Image

from ldm.pipeline.input_warnings import size_warnings
from ldm.pipeline.inputs import ImageRequest


def item(image: tuple[int, int], mask: tuple[int, int] | None = None) -> ImageRequest:
    return ImageRequest("a", "", 0, 1.0, Image.new("RGB", image), mask and Image.new("L", mask))


def test_pictures_and_masks_of_other_sizes_are_named() -> None:
    assert list(size_warnings([ImageRequest("a", "", 0, 1.0), item((8, 4), (8, 4))], (4, 8))) == []
    assert list(size_warnings([item((8, 4), (6, 3))], (4, 4))) == [
        "the image is 4x8; it was scaled and cropped to the 4x4 that is drawn",
        "the mask is 3x6; it was scaled to the image's 4x8",
    ]
