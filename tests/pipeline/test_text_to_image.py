from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.image import to_uint8
from ldm.nn.unet import UNet
from ldm.pipeline.pipeline import Pipeline
from ldm.random import normal
from ldm.sampling.driver import SAMPLERS
from tests.pipeline.tiny import PROMPTS, assembled, distance
from tests.tiny import SAMPLING, save_tiny_model


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_the_rest_of_its_batch(pipeline: Pipeline, sampler: str) -> None:
    seeds = [5, 5, 2**40, 7, 0]
    together = pipeline(PROMPTS, sampler=sampler, seeds=seeds).images
    for size in (1, 2):
        assert distance(pipeline(PROMPTS, sampler=sampler, seeds=seeds, batch_size=size).images, together) <= 1


def test_prompts_seeds_and_every_setting_change_the_image(pipeline: Pipeline) -> None:
    def generate(**changes: Any) -> torch.Tensor:
        return pipeline(**({"prompts": ["a red circle"], "seeds": [1]} | changes)).images

    first = generate()
    for change in (
        {"prompts": ["blue"]},
        {"seeds": [2]},
        {"seeds": [1 + 2**32]},
        {"steps": 5},
        {"sampler": "ddpm"},
        {"sampler": "ddim", "sampler_options": {"eta": 1.0}},
        {"spacing": "custom", "spacing_options": {"times": [1.0, 0.9, 0.1]}},
        {"guidance": 4.0},
        {"negative": "blue"},
        {"chunks": 2},
    ):
        assert distance(generate(**change), first) > 1, change


def test_recorded_settings_reproduce_an_image_bit_for_bit(pipeline: Pipeline) -> None:
    result = pipeline(PROMPTS, sampler="ddpm", steps=4, guidance=3.0, negative="blue", size=(8, 16), batch_size=2)
    assert result.images.shape == (5, 3, 8, 16) and result.images.dtype == torch.uint8
    for image, settings in zip(result.images, result.settings, strict=True):
        batch = settings["batch"]
        names = ("negative", "sampler", "spacing", "steps", "guidance", "size")
        reproduced = pipeline(batch["prompts"], seeds=batch["seeds"], **{name: settings[name] for name in names})
        assert torch.equal(reproduced.images[batch["position"]], image)
        assert settings["prompt"] == batch["prompts"][batch["position"]]


def test_the_models_sampler_options_do_not_apply_to_another_sampler(pipeline: Pipeline) -> None:
    own = {"sampler_options": {"rule": "heun"}, "spacing_options": {}}
    other = assembled(pipeline, settings=replace(pipeline.settings, **own))
    calls: list[dict[str, Any]] = [{}, {"sampler": "dpmpp_2m"}, {"sampler": "ddim"}]
    options = [other("red", **call).settings[0]["sampler_options"] for call in calls]
    assert options == [{"rule": "heun"}, {"rule": "heun"}, {}]


def test_settings_default_to_those_of_the_model(pipeline: Pipeline) -> None:
    settings = pipeline("red").settings[0]
    assert {name: settings[name] for name in SAMPLING} == SAMPLING
    assert settings["size"] == [16, 16] and settings["seed"] == 0 and settings["negative"] == ""


def test_an_estimate_of_zero_decodes_to_the_image_of_zero_latents(pipeline: Pipeline) -> None:
    """Flow with out = eps - x0 = x at t = 1 means x0 = 0: one step reaches it from any noise."""

    class Echo(UNet):
        def forward(self, x: torch.Tensor, time: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
            assert (time == 1000).all()
            return x.repeat(len(conditioning) // len(x), 1, 1, 1)

    images = assembled(pipeline, backbone=Echo(**pipeline.backbone.config))(PROMPTS, steps=1).images
    expected = to_uint8(pipeline.first_stage.decode(torch.zeros(5, 4, 8, 8)))
    assert distance(images, expected) <= 1


def test_initial_noise_depends_on_seed_and_size_alone(pipeline: Pipeline) -> None:
    seen = []
    hook = pipeline.backbone.register_forward_hook(lambda module, args, out: seen.append(args[0][0]))
    pipeline(["red"], seeds=[3])
    pipeline(["blue", "white"], seeds=[3, 4], steps=5, sampler="ddpm", guidance=1.0)
    hook.remove()
    assert torch.equal(seen[0], seen[3])  # the flow schedule's first sigma is 1
    assert torch.equal(seen[0], normal(0, "initial noise", torch.tensor([3]), 0, (4, 8, 8))[0])


def test_bfloat16_networks_sample_nearly_the_same_images(tmp_path: Path, pipeline: Pipeline) -> None:
    half = Pipeline.load(str(save_tiny_model(tmp_path)), "cpu", torch.bfloat16)
    assert half.backbone.dtype == torch.bfloat16
    assert half.first_stage.scale.dtype == torch.float32
    error = half(PROMPTS).images.float() - pipeline(PROMPTS).images.float()
    assert error.abs().mean() < 8  # bf16 keeps 8 bits, over three steps of random networks


@pytest.mark.parametrize("size", [(16, 16), (64, 64)])
def test_bfloat16_images_are_bit_identical_at_any_batch_size(size: tuple[int, int], tmp_path: Path) -> None:
    half = Pipeline.load(str(save_tiny_model(tmp_path)), "cpu", torch.bfloat16)
    together = half(PROMPTS, size=size).images
    for batch in (1, 2, 3):
        assert torch.equal(half(PROMPTS, size=size, batch_size=batch).images, together)


def test_sizes_that_the_unet_downsamples_unevenly_can_be_sampled(pipeline: Pipeline) -> None:
    assert pipeline("red", size=(10, 14)).images.shape == (1, 3, 10, 14)


def test_images_can_be_decoded_in_tiles(pipeline: Pipeline) -> None:
    untiled, tiled = (pipeline(PROMPTS, tile=tile).images for tile in (0, 16))
    assert distance(untiled, tiled) <= 1  # one tile per image: only the batch is split


def test_a_seed_may_select_the_noise_of_diffusers(pipeline: Pipeline) -> None:
    together = pipeline(["red", "blue"], seeds=[5, 6], noise="diffusers", sampler="ddpm")
    alone = pipeline("blue", seeds=6, noise="diffusers", sampler="ddpm")
    assert distance(together.images[1:], alone.images) <= 1
    assert distance(together.images[1:], pipeline("blue", seeds=6, sampler="ddpm").images) > 1
