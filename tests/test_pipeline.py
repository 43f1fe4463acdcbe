import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.image import from_uint8, to_pil, to_uint8
from ldm.items import Between
from ldm.nn.clip import TextTower
from ldm.nn.unet import UNet
from ldm.pipeline import Pipeline
from ldm.random import normal
from ldm.sampling.driver import SAMPLERS, Cancelled
from ldm.settings import Settings
from ldm.weights.model import read_model
from tests.tiny import SAMPLING, randomised, save_tiny_model, tiny_text_tower, tiny_unet, tiny_vae

PICTURE = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
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
        {"sampler": "ddim", "sampler_options": {"eta": 1.0}},
        {"spacing": "custom", "spacing_options": {"times": [1.0, 0.9, 0.1]}},
        {"guidance": 4.0},
        {"negative": "blue"},
        {"chunks": 2},
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


def test_the_models_own_options_do_not_go_to_another_sampler_or_spacing(pipeline: Pipeline) -> None:
    own = {"sampler_options": {"rule": "heun"}, "spacing_options": {}}
    other = assembled(pipeline, settings=replace(pipeline.settings, **own))
    calls: list[dict[str, Any]] = [{}, {"sampler": "dpmpp_2m"}, {"sampler": "ddim"}]
    told = [other("red", **call).settings[0]["sampler_options"] for call in calls]
    assert told == [{"rule": "heun"}, {"rule": "heun"}, {}]


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


def test_outside_its_interval_of_sigma_over_alpha_there_is_no_guidance(pipeline: Pipeline) -> None:
    sizes = []
    hook = pipeline.unet.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    pipeline(PROMPTS[:3], sampler="euler", steps=4, guidance_interval=(0.5, 2.0))  # of inf, 3, 1 and 1/3
    hook.remove()
    assert sizes == [3, 3, 6, 3]
    with pytest.raises(ValueError, match="holds no time that is sampled"):
        pipeline("red", steps=4, guidance_interval=(200.0, 800.0))


def test_rescaling_changes_guided_pictures_only(pipeline: Pipeline) -> None:
    guided, plain = ([pipeline("red", guidance=w, guidance_rescale=r).images for r in (0.0, 1.0)] for w in (50.0, 1.0))
    assert distance(*guided) > 1 and torch.equal(*plain)


def test_at_full_strength_from_pure_noise_no_picture_is_seen(pipeline: Pipeline) -> None:
    assert torch.equal(pipeline(PROMPTS, image=PICTURE, strength=1.0).images, pipeline(PROMPTS).images)


def test_from_noise_that_is_not_pure_a_picture_is_seen_at_full_strength(pipeline: Pipeline) -> None:
    other = assembled(pipeline, schedule=scaled_linear(), prediction=Prediction("v"))
    drawn = [other("red", image=picture, strength=1.0).images for picture in (PICTURE, 255 - PICTURE)]
    assert not torch.equal(*drawn)


def test_a_picture_is_left_where_the_last_steps_of_the_same_walk_begin(pipeline: Pipeline) -> None:
    seen = []
    hook = pipeline.unet.register_forward_hook(lambda module, args, out: seen.append((args[0][0], float(args[1][0]))))
    pipeline("red", image=PICTURE, strength=0.5, steps=5, seeds=3, guidance=1.0)
    hook.remove()
    assert [time for _, time in seen] == pytest.approx([400, 200])  # of 1000, 800, 600, 400, 200
    x0 = pipeline.first_stage.encode(from_uint8(PICTURE[None]))
    eps = normal(0, "initial noise", torch.tensor([3]), 0, (4, 8, 8))
    torch.testing.assert_close(seen[0][0], (0.6 * x0 + 0.4 * eps)[0])


def test_a_mask_that_repaints_everything_is_image_to_image(pipeline: Pipeline) -> None:
    call: dict[str, Any] = {"image": PICTURE, "strength": 0.7, "sampler": "ddpm"}
    masked = pipeline(PROMPTS, mask=torch.full((1, 16, 16), 255, dtype=torch.uint8), **call)
    assert torch.equal(masked.images, pipeline(PROMPTS, **call).images)


def test_what_a_mask_does_not_repaint_is_the_pictures_own(pipeline: Pipeline) -> None:
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[..., 8:] = True
    images = pipeline(PROMPTS, image=PICTURE, mask=mask).images
    assert torch.equal(images[..., :8], PICTURE[..., :8].expand(5, 3, 16, 8))
    assert distance(images[..., 8:], PICTURE[..., 8:]) > 16


def test_pictures_and_masks_of_other_sizes_are_scaled_which_is_said(pipeline: Pipeline) -> None:
    with pytest.warns(UserWarning) as caught:
        images = pipeline("red", image=to_pil(PICTURE)[0].resize((30, 20)), mask=to_pil(PICTURE)[0]).images
    told = [str(warning.message) for warning in caught]
    assert told == [
        "the image is 20x30; it was scaled and cropped to the 16x16 that is drawn",
        "the mask is 16x16; it was scaled to the image's 20x30",
    ]
    assert images.shape == (1, 3, 16, 16)


def test_each_picture_may_have_its_own_negative_guidance_image_and_mask(pipeline: Pipeline) -> None:
    own: dict[str, list[Any]] = {
        "negative": ["blue", "", "white"],
        "guidance": [3.0, 1.0, 5.0],
        "image": [PICTURE, 255 - PICTURE, PICTURE],
        "mask": [mask[None] for mask in PICTURE],
        "seeds": [4, 5, 6],
    }
    together = pipeline(PROMPTS[:3], **own)
    for k in range(3):
        alone = pipeline(PROMPTS[k], **{name: values[k] for name, values in own.items()})
        assert distance(alone.images, together.images[k]) <= 1
        assert (together.settings[k]["negative"], together.settings[k]["guidance"]) == (
            own["negative"][k],
            own["guidance"][k],
        )
    assert together.settings[0]["batch"]["negative"] == own["negative"]


def test_steps_of_image_to_image_are_counted(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(
        PROMPTS[:2],
        image=PICTURE,
        strength=0.5,
        steps=4,
        batch_size=1,
        on_step=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 4) for done in range(1, 5)]


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


def test_a_long_prompt_is_read_in_chunks_each_by_itself(pipeline: Pipeline) -> None:
    seen = []
    hook = pipeline.unet.register_forward_hook(lambda module, args, out: seen.append(args[2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline("red " * 14 + "blue square", steps=1, chunks=2, guidance=1.0)
    hook.remove()
    parts = [pipeline.text_encoder(pipeline.tokenizer([part])) for part in ("red " * 14, "blue square")]
    torch.testing.assert_close(seen[0], torch.cat(parts, dim=1))


def test_layers_of_the_text_encoder_can_be_skipped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    deep = TextTower(width=16, layers=3, heads=2, context=16)
    skipping = TextTower(**(deep.config | {"skip": 1}))
    skipping.load_state_dict(deep.state_dict())
    whole = Pipeline.load(str(save_tiny_model(tmp_path)), device="cpu")
    drawn = [
        assembled(whole, text_encoder=tower)(["red"], clip_skip=skip).images
        for tower, skip in ((deep, 1), (skipping, 0), (deep, 0))
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_sizes_that_the_unet_halves_unevenly_can_be_drawn(pipeline: Pipeline) -> None:
    assert pipeline("red", size=(10, 14)).images.shape == (1, 3, 10, 14)


def test_pictures_can_be_decoded_in_tiles(pipeline: Pipeline) -> None:
    whole, tiled = (pipeline(PROMPTS, tile=tile).images for tile in (0, 16))
    assert distance(whole, tiled) <= 1  # one tile a picture: the batch is all that is cut


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
        ({"seeds": [1, 2]}, "there are 1 prompts, 2 seeds"),
        ({"strength": 0.5}, "there is no image to start from"),
        ({"image": PICTURE, "strength": 0}, "strength is 0, but must be above 0 and at most 1"),
        ({"image": PICTURE, "strength": 1.5}, "strength is 1.5, but must be above 0 and at most 1"),
        ({"image": PICTURE, "strength": 0.1}, "strength=0.1 of 3 steps is less than one step"),
        ({"image": PICTURE, "strength": 0.01, "fixed_steps": True, "steps": 20}, "the end of 2000, but 1000 is the"),
        ({"noise": "numpy"}, "noise is 'numpy', but must be one of ldm, diffusers"),
        ({"prompts": "red", "seeds": Between(1, -2, 0.5)}, "a seed is -2, but must be a whole number"),
        ({"prompts": Between("red", 3, 0.5)}, "a prompt is 3, which is no text"),
        ({"thresholding": "hard"}, "thresholding is 'hard', but must be one of none, static, dynamic"),
        ({"thresholding": "static", "thresholding_options": {"limit": 0}}, "limit of thresholding is 0, but must be"),
        ({"image": "cat.png"}, "the image is 'cat.png', but must be a PIL picture"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps": 0}, "steps is 0, but must lie between 1 and 1000"),
        ({"sampler": "magic"}, "sampler is 'magic', but must be one of ddpm, ddim"),
        ({"spacing": "even"}, "spacing is 'even', but must be one of trailing"),
        ({"sampler_options": {"eta": 1.0}}, "sampler=dpmpp_2m has no option 'eta'; its options are: rule"),
        ({"sampler": "ddim", "sampler_options": {"eta": 2.0}}, "eta is 2.0, but must be a number from 0.0 to 1.0"),
        ({"spacing": "custom", "spacing_options": {"times": [0.1, 0.5, 1.0]}}, "must be numbers that fall"),
        ({"size": (17, 16)}, "size is 17x16, .* multiples of 2"),
        ({"size": (0, 16)}, "size is 0x16, .* multiples of 2"),
        ({"spacing": "leading"}, "use spacing=trailing"),
        ({"chunks": 0}, "chunks is 0, but must be 1 or more"),
        ({"clip_skip": 1}, "1 layers cannot leave out 1"),
        ({"tile": 5}, "tile is 5, .* multiple of 2 pixels"),
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


def inpainting(pipeline: Pipeline) -> Pipeline:
    config = pipeline.unet.config | {"in_channels": 9}
    return assembled(pipeline, unet=randomised(UNet(**config), 3, std=0.3))


def test_inpainting_weights_see_the_mask_and_what_is_kept(pipeline: Pipeline) -> None:
    seen = []
    inpaint = inpainting(pipeline)
    hook = inpaint.unet.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[..., 8:] = True
    images = inpaint(PROMPTS[:2], image=PICTURE, mask=mask, steps=2).images
    hook.remove()
    kept = from_uint8(PICTURE[None]) * ~mask
    expected = torch.cat((mask[None, :, ::2, ::2].float(), pipeline.first_stage.encode(kept)), dim=1)
    torch.testing.assert_close(seen[0][:, 4:], expected.expand(4, -1, -1, -1))
    assert torch.equal(images[..., :8], PICTURE[..., :8].expand(2, 3, 16, 8))


def test_inpainting_weights_draw_from_noise_where_there_is_no_picture_or_a_strength_of_1(pipeline: Pipeline) -> None:
    inpaint, white = inpainting(pipeline), torch.ones(1, 16, 16, dtype=torch.bool)
    drawn = inpaint("red").images
    assert torch.equal(inpaint("red", image=PICTURE, mask=white).images, drawn)
    assert torch.equal(inpaint("red", image=PICTURE, strength=1.0).images, drawn)
    half = {"strength": 0.5, "fixed_steps": True}
    assert (
        distance(inpaint("red", image=PICTURE, **half).images, inpaint("red", image=255 - PICTURE, **half).images) > 1
    )


def test_fixed_steps_are_as_many_from_where_the_strength_begins(pipeline: Pipeline) -> None:
    times = []
    hook = pipeline.unet.register_forward_hook(lambda module, args, out: times.append(float(args[1][0])))
    result = pipeline("red", image=PICTURE, strength=0.5, steps=4, fixed_steps=True, guidance=1.0)
    hook.remove()
    assert times == pytest.approx([500, 375, 250, 125])
    assert result.settings[0]["fixed_steps"] is True and result.settings[0]["steps"] == 4
    without = pipeline("red", fixed_steps=True).images
    assert torch.equal(without, pipeline("red").images)  # from noise nothing changes


def test_thresholding_bounds_what_is_decoded(pipeline: Pipeline) -> None:
    decoded = []
    hook = pipeline.first_stage.post_quant.register_forward_pre_hook(lambda module, args: decoded.append(args[0]))
    scale = float(pipeline.first_stage.scale)
    for name, options in (("static", {"limit": 0.1}), ("dynamic", {"share": 0.9, "limit": 0.1})):
        pipeline("red", thresholding=name, thresholding_options=options)
    hook.remove()
    assert [float(x.abs().max() * scale) for x in decoded] == pytest.approx([0.1, 0.1])


def test_with_a_weak_model_guidance_leads_away_from_what_that_gives(pipeline: Pipeline) -> None:
    weak = assembled(pipeline, unet=tiny_unet(seed=7))
    guided = assembled(pipeline, weak=weak)
    plain = {"guidance": 1.0, "steps": 1, "sampler": "euler"}
    strong_x0, weak_x0 = (latents_of(one, **plain) for one in (pipeline, weak))
    torch.testing.assert_close(latents_of(guided, **plain), strong_x0)
    expected = weak_x0 + 3 * (strong_x0 - weak_x0)
    torch.testing.assert_close(latents_of(guided, **(plain | {"guidance": 3.0})), expected, rtol=1e-4, atol=1e-4)


def latents_of(pipeline: Pipeline, **call: Any) -> torch.Tensor:
    seen = []
    hook = pipeline.first_stage.post_quant.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pipeline("red", **call)
    hook.remove()
    return seen[0]


def test_a_weak_model_of_other_parts_is_refused(tmp_path: Path) -> None:
    paths = [save_tiny_model(tmp_path / name) for name in ("a", "b")]
    strong, other = read_model(paths[0]), read_model(paths[1])
    other.about["model"]["schedule"] = {"name": "flow", "shift": 3.0}
    with pytest.raises(ValueError, match=r"weak model .* has another schedule than"):
        Pipeline.of(strong, "cpu", weak=other)
    Pipeline.load(str(paths[0]), "cpu", weak=str(paths[1]))


@pytest.mark.parametrize("mode", ["idle", "sequential"])
def test_where_networks_wait_changes_no_picture(pipeline: Pipeline, mode: str, tmp_path: Path) -> None:
    waiting = Pipeline.load(str(save_tiny_model(tmp_path)), "cpu", offload=mode)
    call: dict[str, Any] = {"image": PICTURE, "mask": PICTURE[:1], "seeds": [1, 2], "tile": 16}
    assert torch.equal(waiting(PROMPTS[:2], **call).images, pipeline(PROMPTS[:2], **call).images)


def test_too_many_pictures_for_the_memory_are_drawn_in_smaller_batches(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    seen: list[tuple[int, int]] = []
    hook = pipeline.unet.register_forward_pre_hook(small)
    with pytest.warns(UserWarning, match="memory does not suffice for 5 pictures at a time") as caught:
        result = pipeline(PROMPTS, steps=2, on_step=lambda *news: seen.append(news))
    hook.remove()
    assert len(caught) == 1 and [len(one["batch"]["seeds"]) for one in result.settings] == [2, 2, 2, 2, 1]
    assert seen == [(done, 6) for done in range(1, 7)]
    assert torch.equal(result.images, pipeline(PROMPTS, steps=2, batch_size=2).images)


def test_pictures_lie_between_two_prompts_or_seeds(pipeline: Pipeline) -> None:
    prompts = [Between("a red circle", "blue", share) for share in (0.0, 0.5, 1.0)]
    seeds = [Between(1, 2, share) for share in (0.0, 0.5, 1.0)]
    result = pipeline(prompts, seeds=seeds)
    one, other = pipeline("a red circle", seeds=1).images, pipeline("blue", seeds=2).images
    assert distance(result.images[:1], one) <= 1 and distance(result.images[2:], other) <= 1
    assert min(distance(result.images[1:2], end) for end in (one, other)) > 1
    assert result.settings[1]["prompt"] == {"first": "a red circle", "second": "blue", "share": 0.5}
    assert result.settings[0]["batch"]["seeds"][1] == {"first": 1, "second": 2, "share": 0.5}


def test_a_seed_may_mean_the_noise_of_diffusers(pipeline: Pipeline) -> None:
    drawn = pipeline(["red", "blue"], seeds=[5, 6], noise="diffusers", sampler="ddpm")
    alone = pipeline("blue", seeds=6, noise="diffusers", sampler="ddpm")
    assert distance(drawn.images[1:], alone.images) <= 1
    assert distance(drawn.images[1:], pipeline("blue", seeds=6, sampler="ddpm").images) > 1


def test_estimates_are_shown_by_step(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int, torch.Tensor]] = []
    images = pipeline(PROMPTS[:3], batch_size=2, on_estimate=lambda *news: seen.append(news)).images
    assert [news[:2] for news in seen] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)]
    ends = pipeline.small(torch.cat((seen[2][2], seen[5][2])))
    assert torch.equal(ends, images)  # the last step leads to its estimate


def test_estimates_of_large_pictures_are_shown_small(pipeline: Pipeline) -> None:
    seen: list[torch.Tensor] = []
    pipeline("red", size=(40, 70), steps=1, on_estimate=lambda first, step, x0: seen.append(pipeline.small(x0)))
    assert [small.shape for small in seen] == [(1, 3, 14, 24)]  # latents of 20x35, averaged by threes


def test_a_call_can_be_cancelled_between_two_steps(pipeline: Pipeline) -> None:
    steps: list[int] = []
    with pytest.raises(Cancelled):
        pipeline("red", on_step=lambda done, total: steps.append(done), cancelled=lambda: len(steps) == 2)
    assert steps == [1, 2]
