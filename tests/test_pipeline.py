import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.image import to_uint8
from ldm.pipeline import Pipeline, Settings, choose_device
from ldm.random import normal
from ldm.sampling.driver import SAMPLERS
from tests.tiny import SAMPLING, save_tiny_model, tiny_text_tower, tiny_unet, tiny_vae

PROMPTS = ["a red circle", "a blue square", "a square on a red background", "white circle", "red"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.load(str(save_tiny_model(tmp_path_factory.mktemp("model"))), device="cpu")


def assembled(pipeline: Pipeline, **changes: Any) -> Pipeline:
    parts = {
        "unet": pipeline.unet,
        "first_stage": pipeline.first_stage,
        "text_encoder": pipeline.text_encoder,
        "tokenizer": pipeline.tokenizer,
        "schedule": Flow(),
        "prediction": Prediction("flow"),
        "settings": pipeline.settings,
    }
    return Pipeline(**(parts | changes))


def distance(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(pipeline: Pipeline, sampler: str) -> None:
    seeds = [5, 5, 2**40, 7, 0]
    together = pipeline(PROMPTS, sampler=sampler, seeds=seeds).images
    for size in (1, 2):
        assert distance(pipeline(PROMPTS, sampler=sampler, seeds=seeds, batch_size=size).images, together) <= 1


def test_prompts_seeds_and_every_setting_change_the_picture(pipeline: Pipeline) -> None:
    def draw(**changes: Any) -> torch.Tensor:
        return pipeline(**({"prompts": ["a red circle"], "seeds": [1]} | changes)).images

    first = draw()
    for change in (
        {"prompts": ["blue"]},
        {"seeds": [2]},
        {"seeds": [1 + 2**32]},
        {"steps": 5},
        {"sampler": "ddpm"},
        {"guidance": 4.0},
        {"negative": "blue"},
    ):
        assert distance(draw(**change), first) > 1, change


def test_settings_suffice_to_draw_a_picture_again_bit_for_bit(pipeline: Pipeline) -> None:
    result = pipeline(PROMPTS, sampler="ddpm", steps=4, guidance=3.0, negative="blue", size=(8, 16), batch_size=2)
    assert result.images.shape == (5, 3, 8, 16) and result.images.dtype == torch.uint8
    for image, settings in zip(result.images, result.settings, strict=True):
        batch = settings["batch"]
        names = ("negative", "sampler", "spacing", "steps", "guidance", "size")
        again = pipeline(batch["prompts"], seeds=batch["seeds"], **{name: settings[name] for name in names})
        assert torch.equal(again.images[batch["position"]], image)
        assert settings["prompt"] == batch["prompts"][batch["position"]]


def test_what_a_call_does_not_say_is_the_models_own(pipeline: Pipeline) -> None:
    settings = pipeline("red").settings[0]
    assert {name: settings[name] for name in SAMPLING} == SAMPLING
    assert settings["size"] == [16, 16] and settings["seed"] == 0 and settings["negative"] == ""


def test_a_clean_prediction_of_zero_gives_the_first_stages_picture_of_zero(pipeline: Pipeline) -> None:
    """Flow with out = eps - x0 = x at t = 1 means x0 = 0: one step leads there from any noise."""

    class Echo(torch.nn.Module):
        config = pipeline.unet.config
        conv_in = pipeline.unet.conv_in

        def forward(self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            assert (time == 1000).all()
            return x

    images = assembled(pipeline, unet=Echo())(PROMPTS, steps=1).images
    expected = to_uint8(pipeline.first_stage.decode(torch.zeros(5, 4, 8, 8)))
    assert distance(images, expected) <= 1


def test_both_halves_of_guidance_go_in_one_call(pipeline: Pipeline) -> None:
    sizes = []
    hook = pipeline.unet.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    pipeline(PROMPTS[:3], steps=2)
    pipeline(PROMPTS[:3], steps=1, guidance=1.0)
    hook.remove()
    assert sizes == [6, 6, 3]


def test_initial_noise_depends_on_seed_and_size_alone(pipeline: Pipeline) -> None:
    seen = []
    hook = pipeline.unet.register_forward_hook(lambda module, args, out: seen.append(args[0][0]))
    pipeline(["red"], seeds=[3])
    pipeline(["blue", "white"], seeds=[3, 4], steps=5, sampler="ddpm", guidance=1.0)
    hook.remove()
    assert torch.equal(seen[0], seen[3])  # the flow schedule's first sigma is 1
    assert torch.equal(seen[0], normal(0, "initial noise", torch.tensor([3]), 0, (4, 8, 8))[0])


def test_steps_are_counted_over_all_batches(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(PROMPTS, batch_size=2, steps=2, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_half_precision_networks_draw_nearly_the_same(tmp_path: Path, pipeline: Pipeline) -> None:
    half = Pipeline.load(str(save_tiny_model(tmp_path)), "cpu", torch.bfloat16)
    assert half.unet.conv_in.weight.dtype == torch.bfloat16
    assert half.first_stage.scale.dtype == torch.float32
    error = half(PROMPTS).images.float() - pipeline(PROMPTS).images.float()
    assert error.abs().mean() < 8  # bf16 keeps 8 bits, over three steps of random networks


def test_the_end_of_a_long_prompt_is_warned_of(pipeline: Pipeline) -> None:
    with pytest.warns(UserWarning, match="longer than the 16 tokens .* cut off: 'blue square'") as caught:
        pipeline("red " * 14 + "blue square")
    assert [warning.filename for warning in caught] == [__file__]


def test_words_that_the_text_encoder_does_not_know_are_named(pipeline: Pipeline) -> None:
    with pytest.warns(UserWarning, match=r"does not know 'purple', ',' in 'a purple, red circle'"):
        pipeline("a purple, red circle")


def test_a_prompt_that_is_read_in_full_raises_no_warning(pipeline: Pipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline(PROMPTS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": []}, "expected prompts and a seed for each, got 0 and 0"),
        ({"seeds": [1, 2]}, "got 1 and 2"),
        ({"seeds": [-1]}, "must lie between 0 and 9223372036854775807"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps": 0}, "steps is 0, but must lie between 1 and 1000"),
        ({"sampler": "magic"}, "sampler is 'magic', but must be one of ddpm, ddim"),
        ({"spacing": "even"}, "spacing is 'even', but must be one of trailing"),
        ({"size": (18, 16)}, "size is 18x16, .* multiples of 4"),
        ({"size": (0, 16)}, "size is 0x16, .* multiples of 4"),
        ({"spacing": "leading"}, "use spacing=trailing"),
    ],
)
def test_a_call_that_cannot_be_drawn_is_refused(pipeline: Pipeline, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**({"prompts": ["red"]} | call))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": Prediction("eps")}, "use prediction=v or prediction=flow"),
        ({"first_stage": tiny_vae(), "unet": tiny_unet(), "time": "log_sigma"}, "use time=thousand"),
        ({"schedule": scaled_linear(), "time": "hour"}, "the network's time is 'hour'"),
    ],
)
def test_parts_that_contradict_one_another_are_refused(
    pipeline: Pipeline, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assembled(pipeline, **changes)


def test_a_text_encoder_of_another_width_is_refused(pipeline: Pipeline) -> None:
    tower = tiny_text_tower()
    tower.config = tower.config | {"width": 24}
    with pytest.raises(ValueError, match="context_width are 24 and 16, but must be equal"):
        assembled(pipeline, text_encoder=tower)


def test_settings_have_a_size_and_the_rest_by_default() -> None:
    assert Settings(size=(64, 64)).sampler in SAMPLERS


@pytest.mark.parametrize(
    ("name", "message"), [("gpu", "must be auto, cpu, cuda"), ("cuda:99", "there is no device cuda:99")]
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_device(name)
