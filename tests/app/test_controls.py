from typing import Any

import pytest
from PIL import Image, ImageChops

from ldm.items import MAX_SEED

controls = pytest.importorskip("ldm.app.controls", reason="the page needs Gradio: pip install -e '.[app]'")


def values(**changes: Any) -> dict[str, Any]:
    own = {"sampler": "ddim", "spacing": "trailing", "steps": 4, "guidance": 2.0, "height": 16, "width": 32}
    asked = {"prompt": "red", "negative": "", "model": "tiny", "seed": "7", "count": 2, "strength": 0.5, "editor": None}
    return own | asked | changes


def painting() -> dict[str, Any]:
    background = Image.new("RGBA", (32, 16), (10, 20, 30, 255))
    layer = Image.new("RGBA", background.size)
    layer.paste((255, 46, 99, 255), (0, 0, 16, 16))
    return {"background": background, "layers": [layer], "composite": None}


def test_a_request_has_a_seed_a_picture_and_the_size_as_height_and_width():
    request = controls.request_of(values(), {})
    assert request.seeds == [7, 8] and request.call["size"] == (16, 32)
    assert "strength" not in request.call and request.sources == {}


def test_no_seed_is_another_one_each_time():
    assert len({controls.first_seed("") for _ in range(20)}) > 1 and all(
        0 <= controls.first_seed(" ") <= MAX_SEED for _ in range(20)
    )


@pytest.mark.parametrize("text", ["-1", "1.5", "seven", "²", str(2**63)])
def test_a_seed_that_is_none_is_refused(text: str):
    with pytest.raises(ValueError, match="seed is"):
        controls.first_seed(text)


def test_restored_settings_without_a_control_stay_and_options_of_another_sampler_go():
    restored = {"sampler": "ddim", "sampler_options": {"eta": 0.5}, "clip_skip": 1, "steps": 99}
    assert controls.request_of(values(), restored).call["sampler_options"] == {"eta": 0.5}
    call = controls.request_of(values(sampler="euler"), restored).call
    assert call["clip_skip"] == 1 and call["steps"] == 4 and "sampler_options" not in call


def test_what_is_painted_is_the_mask_and_only_that():
    sources = controls.sources_of(painting())
    assert sources["init"].mode == "RGB" and sources["init"].getpixel((0, 0)) == (10, 20, 30)
    assert sources["mask"].getbbox() == (0, 0, 16, 16)
    assert "mask" not in controls.sources_of(painting() | {"layers": [Image.new("RGBA", (32, 16))]})


def test_transparent_parts_of_a_picture_are_white():
    assert (
        controls.sources_of(painting() | {"background": Image.new("RGBA", (8, 8))})["init"].getpixel((0, 0))
        == (255,) * 3
    )


def test_painting_without_a_picture_is_refused():
    with pytest.raises(ValueError, match="without a picture"):
        controls.sources_of(painting() | {"background": None})


def test_what_was_restored_reads_as_it_was_painted():
    sources = controls.sources_of(painting())
    again = controls.sources_of(controls.painting_of(sources))
    assert all(ImageChops.difference(again[name], sources[name]).getbbox() is None for name in ("init", "mask"))
    assert controls.painting_of({}) is None
