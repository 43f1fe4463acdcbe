from typing import Any

import pytest
from PIL import Image, ImageChops

from ldm.app.painting import painting_of, sources_of


def painting() -> dict[str, Any]:
    background = Image.new("RGBA", (32, 16), (10, 20, 30, 255))
    layer = Image.new("RGBA", background.size)
    layer.paste((255, 46, 99, 255), (0, 0, 16, 16))
    return {"background": background, "layers": [layer], "composite": None}


def test_what_is_painted_is_the_mask_and_only_that():
    sources = sources_of(painting())
    assert sources["init"].mode == "RGB" and sources["init"].getpixel((0, 0)) == (10, 20, 30)
    assert sources["mask"].getbbox() == (0, 0, 16, 16)
    assert "mask" not in sources_of(painting() | {"layers": [Image.new("RGBA", (32, 16))]})


def test_transparent_parts_of_a_picture_are_white():
    assert sources_of(painting() | {"background": Image.new("RGBA", (8, 8))})["init"].getpixel((0, 0)) == (255,) * 3


def test_painting_without_a_picture_is_refused():
    with pytest.raises(ValueError, match="without a picture"):
        sources_of(painting() | {"background": None})


def test_what_was_restored_reads_as_it_was_painted():
    sources = sources_of(painting())
    again = sources_of(painting_of(sources))
    assert all(ImageChops.difference(again[name], sources[name]).getbbox() is None for name in ("init", "mask"))
    assert painting_of({}) is None
