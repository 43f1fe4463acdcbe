from typing import Any

import pytest

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import scaled_linear
from ldm.nn.clip import TextTower
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.pipeline.inputs import Between
from ldm.pipeline.pipeline import Pipeline
from tests.pipeline.tiny import IMAGE, assembled
from tests.tiny import tiny_dit, tiny_unet, tiny_vae


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"seeds": [1, 2]}, "there are 1 prompts, 2 seeds"),
        ({"strength": 0.5}, "there is no image to start from"),
        ({"image": IMAGE, "strength": 0}, "strength is 0, but must be above 0 and at most 1"),
        ({"image": IMAGE, "strength": 1.5}, "strength is 1.5, but must be above 0 and at most 1"),
        ({"image": IMAGE, "strength": 0.1}, "strength=0.1 of 3 steps is less than one step"),
        (
            {"image": IMAGE, "strength": 0.01, "fixed_steps": True, "steps": 20},
            "the last of 2000 steps, but at most 1000",
        ),
        ({"noise": "numpy"}, "noise is 'numpy', but must be one of ldm, diffusers"),
        ({"prompts": "red", "seeds": Between(1, -2, 0.5)}, "a seed is -2, but must be an integer"),
        ({"prompts": Between("red", 3, 0.5)}, "a prompt is 3, which is not text"),
        ({"thresholding": "hard"}, "thresholding is 'hard', but must be one of none, static, dynamic"),
        ({"thresholding": "static", "thresholding_options": {"limit": 0}}, "limit of thresholding is 0, but must be"),
        ({"image": "cat.png"}, "the image is 'cat.png', but must be a PIL image"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps": 0}, "steps is 0, but must be a whole number between 1 and 1000"),
        ({"sampler": "magic"}, "sampler is 'magic', but must be one of ddpm, ddim"),
        ({"spacing": "even"}, "spacing is 'even', but must be one of trailing"),
        ({"sampler_options": {"eta": 1.0}}, "sampler=dpmpp_2m has no option 'eta'; its options are: rule"),
        ({"sampler": "ddim", "sampler_options": {"eta": 2.0}}, "eta is 2.0, but must be a number from 0.0 to 1.0"),
        ({"spacing": "custom", "spacing_options": {"times": [0.1, 0.5, 1.0]}}, "must be decreasing numbers"),
        ({"size": (17, 16)}, "size is 17x16, .* multiples of 2"),
        ({"size": (0, 16)}, "size is 0x16, .* multiples of 2"),
        ({"spacing": "leading"}, "use spacing=trailing"),
        ({"chunks": 0}, "chunks is 0, but must be 1 or more"),
        ({"clip_skip": 1}, "1 layers cannot skip 1"),
        ({"tile": 5}, "tile is 5, .* multiple of 2 pixels"),
    ],
)
def test_an_invalid_call_is_refused(pipeline: Pipeline, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**({"prompts": ["red"]} | call))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": Prediction("eps")}, "use prediction=v or prediction=flow"),
        ({"first_stage": tiny_vae(), "backbone": tiny_unet(), "time": "log_sigma"}, "use time=thousand"),
        ({"schedule": scaled_linear(), "time": "hour"}, "the network's time is 'hour'"),
    ],
)
def test_incompatible_components_are_refused(pipeline: Pipeline, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assembled(pipeline, **changes)


def test_a_text_encoder_of_another_width_is_refused(pipeline: Pipeline) -> None:
    encoder = TextEncoder([TextTower(width=24, layers=1, heads=2, context=16)], [Tokenizer(context=16)])
    with pytest.raises(ValueError, match="reads text of width 16, but the text encoder gives text of width 24"):
        assembled(pipeline, text_encoder=encoder)


@pytest.mark.parametrize("size", [(16, 18), (18, 16), (6, 16)])
def test_a_size_that_is_not_a_multiple_of_the_patch_size_is_refused(pipeline: Pipeline, size: tuple[int, int]) -> None:
    message = f"size is {size[0]}x{size[1]}, but this model takes heights and widths that are positive multiples of 4"
    with pytest.raises(ValueError, match=f"^{message}$"):
        assembled(pipeline, backbone=tiny_dit())("red", size=size)


def test_a_size_that_the_weak_model_cannot_sample_is_refused(pipeline: Pipeline) -> None:
    weak = assembled(pipeline, backbone=tiny_dit())
    with pytest.raises(ValueError, match=r"size is 18x16, .* multiples of 4"):
        assembled(pipeline, weak=weak)("red", size=(18, 16))
