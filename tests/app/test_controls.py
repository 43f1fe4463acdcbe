from typing import Any

import pytest

from ldm.pipeline.inputs import MAX_SEED

controls = pytest.importorskip("ldm.app.controls", reason="the page needs Gradio: pip install -e '.[app]'")


def values(**changes: Any) -> dict[str, Any]:
    plain = {"sampler": "ddim", "spacing": "trailing", "steps": 4, "guidance": 2.0, "height": 16, "width": 32}
    others = {
        "prompt": "red",
        "negative": "",
        "model": "tiny",
        "seed": "7",
        "count": 2,
        "strength": 0.5,
        "editor": None,
        "prompt_syntax": "plain",
        "loras": [["ink", 0.5], ["other", 0]],
        "embeddings": None,
    }
    return plain | others | changes


def test_a_request_has_one_seed_per_image_and_the_size():
    request = controls.request_of(values(), {})
    assert request.seeds == [7, 8] and request.call["size"] == (16, 32)
    assert "strength" not in request.call and request.sources == {}


def test_a_request_has_the_adapters_with_a_weight_and_the_syntax_of_the_prompt():
    request = controls.request_of(values(embeddings=["zorp"]), {"prompt_syntax": "a1111"})
    assert request.loras == [("ink", 0.5)] and request.embeddings == ["zorp"]
    assert request.call["prompt_syntax"] == "plain"


@pytest.mark.parametrize("weight", ["much", float("nan"), [1]])
def test_an_invalid_weight_is_refused(weight: Any):
    with pytest.raises(ValueError, match="the weight of ink is"):
        controls.request_of(values(loras=[["ink", weight]]), {})


def test_an_empty_seed_is_random():
    assert len({controls.first_seed("") for _ in range(20)}) > 1 and all(
        0 <= controls.first_seed(" ") <= MAX_SEED for _ in range(20)
    )


@pytest.mark.parametrize("text", ["-1", "1.5", "seven", "²", str(2**63)])
def test_an_invalid_seed_is_refused(text: str):
    with pytest.raises(ValueError, match="seed is"):
        controls.first_seed(text)


def test_restored_settings_stay_except_options_of_another_sampler():
    restored = {"sampler": "ddim", "sampler_options": {"eta": 0.5}, "clip_skip": 1, "steps": 99}
    assert controls.request_of(values(), restored).call["sampler_options"] == {"eta": 0.5}
    call = controls.request_of(values(sampler="euler"), restored).call
    assert call["clip_skip"] == 1 and call["steps"] == 4 and "sampler_options" not in call


@pytest.mark.parametrize(
    ("aspect", "size", "expected"),
    [
        ("square", (512, 512), (512, 512)),
        ("landscape 3:2", (512, 512), (448, 640)),
        ("portrait 2:3", (512, 512), (640, 448)),
        ("wide 16:9", (768, 768), (576, 1024)),
        ("landscape 3:2", (64, 64), (48, 80)),
    ],
)
def test_an_aspect_keeps_the_area_in_steps_that_networks_accept(
    aspect: str, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert controls.sides(aspect, size) == expected
