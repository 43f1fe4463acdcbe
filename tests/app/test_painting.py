from typing import Any

import pytest
from PIL import Image, ImageChops

from ldm.app.painting import painting_of, sources_of


def painting() -> dict[str, Any]:
    background = Image.new("RGBA", (32, 16), (10, 20, 30, 255))
    layer = Image.new("RGBA", background.size)
    layer.paste((255, 46, 99, 255), (0, 0, 16, 16))
    return {"background": background, "layers": [layer], "composite": None}


def test_the_mask_is_exactly_the_painted_area():
    sources = sources_of(painting())
    assert sources["init"].mode == "RGB" and sources["init"].getpixel((0, 0)) == (10, 20, 30)
    assert sources["mask"].getbbox() == (0, 0, 16, 16)
    assert "mask" not in sources_of(painting() | {"layers": [Image.new("RGBA", (32, 16))]})


def test_transparent_pixels_become_white():
    assert sources_of(painting() | {"background": Image.new("RGBA", (8, 8))})["init"].getpixel((0, 0)) == (255,) * 3


def test_a_mask_without_a_source_image_is_refused():
    with pytest.raises(ValueError, match="has no source image"):
        sources_of(painting() | {"background": None})


def test_restoring_a_painting_inverts_reading_it():
    sources = sources_of(painting())
    restored = sources_of(painting_of(sources))
    assert all(ImageChops.difference(restored[name], sources[name]).getbbox() is None for name in ("init", "mask"))
    assert painting_of({}) is None
