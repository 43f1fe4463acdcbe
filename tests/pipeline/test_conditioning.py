"""Prompts, guidance and thresholding."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.nn.clip import TextTower
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.pipeline.inputs import Between
from ldm.pipeline.pipeline import Pipeline
from ldm.weights.model import save_model
from tests.pipeline.tiny import PROMPTS, assembled, distance
from tests.tiny import save_tiny_model, tiny_about, tiny_unet


def test_guidance_evaluates_both_prompts_in_one_network_call(pipeline: Pipeline) -> None:
    sizes = []
    hook = pipeline.backbone.register_forward_hook(lambda module, args, out: sizes.append((len(args[0]), len(out))))
    pipeline(PROMPTS[:3], steps=2)
    pipeline(PROMPTS[:3], steps=1, guidance=1.0)
    hook.remove()
    assert sizes == [(3, 6), (3, 6), (3, 3)]


def test_guidance_applies_only_within_its_interval_of_sigma_over_alpha(pipeline: Pipeline) -> None:
    sizes = []
    hook = pipeline.backbone.register_forward_hook(lambda module, args, out: sizes.append((len(args[0]), len(out))))
    pipeline(PROMPTS[:3], sampler="euler", steps=4, guidance_interval=(0.5, 2.0))  # of inf, 3, 1 and 1/3
    hook.remove()
    assert sizes == [(3, 3), (3, 3), (3, 6), (3, 3)]
    with pytest.raises(ValueError, match="contains no sampled time"):
        pipeline("red", steps=4, guidance_interval=(200.0, 800.0))


def test_guidance_rescale_changes_guided_images_only(pipeline: Pipeline) -> None:
    guided, plain = ([pipeline("red", guidance=w, guidance_rescale=r).images for r in (0.0, 1.0)] for w in (50.0, 1.0))
    assert distance(*guided) > 1 and torch.equal(*plain)


def test_autoguidance_extrapolates_away_from_the_weak_models_estimate(pipeline: Pipeline) -> None:
    weak = assembled(pipeline, backbone=tiny_unet(seed=7))
    guided = assembled(pipeline, weak=weak)
    plain = {"guidance": 1.0, "steps": 1, "sampler": "euler"}
    strong_x0, weak_x0 = (latents_of(model, **plain) for model in (pipeline, weak))
    torch.testing.assert_close(latents_of(guided, **plain), strong_x0)
    expected = weak_x0 + 3 * (strong_x0 - weak_x0)
    torch.testing.assert_close(latents_of(guided, **(plain | {"guidance": 3.0})), expected, rtol=1e-4, atol=1e-4)


def latents_of(pipeline: Pipeline, **call: Any) -> torch.Tensor:
    seen = []
    hook = pipeline.first_stage.post_quant.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pipeline("red", **call)
    hook.remove()
    return seen[0]


def test_a_weak_model_with_another_schedule_is_refused(tmp_path: Path) -> None:
    paths = [save_tiny_model(tmp_path / name) for name in ("a", "b")]
    Pipeline.load(str(paths[0]), "cpu", weak=str(paths[1]))
    about = tiny_about(tmp_path)
    about["model"]["schedule"] = {"name": "flow", "shift": 3.0}
    save_model(paths[1], tiny_unet().state_dict(), about)
    with pytest.raises(ValueError, match=r"weak model .* has another schedule than"):
        Pipeline.load(str(paths[0]), "cpu", weak=str(paths[1]))


def test_thresholding_bounds_the_decoded_latents(pipeline: Pipeline) -> None:
    decoded = []
    hook = pipeline.first_stage.post_quant.register_forward_pre_hook(lambda module, args: decoded.append(args[0]))
    scale = float(pipeline.first_stage.scale)
    for name, options in (("static", {"limit": 0.1}), ("dynamic", {"share": 0.9, "limit": 0.1})):
        pipeline("red", thresholding=name, thresholding_options=options)
    hook.remove()
    assert [float(x.abs().max() * scale) for x in decoded] == pytest.approx([0.1, 0.1])


def test_a_truncated_prompt_gives_a_warning(pipeline: Pipeline) -> None:
    with pytest.warns(UserWarning, match="longer than the 16 tokens .* cut off: 'blue square'") as caught:
        pipeline("red " * 14 + "blue square")
    assert [warning.filename for warning in caught] == [__file__]


def test_a_long_prompt_is_encoded_in_independent_chunks(pipeline: Pipeline) -> None:
    seen = []
    hook = pipeline.backbone.register_forward_hook(lambda module, args, out: seen.append(args[2].get("text")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline("red " * 14 + "blue square", steps=1, chunks=2, guidance=1.0)
    hook.remove()
    parts = [pipeline.text_encoder.encode([part]).get("text") for part in ("red " * 14, "blue square")]
    torch.testing.assert_close(seen[0], torch.cat(parts, dim=1))


def test_clip_skip_omits_the_last_layers_of_the_text_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    deep = TextTower(width=16, layers=3, heads=2, context=16)
    skipping = TextTower(**(deep.config | {"skip": 1}))
    skipping.load_state_dict(deep.state_dict())
    pipeline = Pipeline.load(str(save_tiny_model(tmp_path)), device="cpu")
    images = [
        assembled(pipeline, text_encoder=TextEncoder([tower], [Tokenizer(context=16)]))(["red"], clip_skip=skip).images
        for tower, skip in ((deep, 1), (skipping, 0), (deep, 0))
    ]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_a_warning_names_unknown_words(pipeline: Pipeline) -> None:
    with pytest.warns(UserWarning, match=r"lacks 'purple', ',' in 'a purple, red circle'"):
        pipeline("a purple, red circle")


def test_many_truncated_and_unknown_prompts_give_two_warnings(pipeline: Pipeline) -> None:
    words = [f"word{i}" for i in range(14)]
    long = "red " * 20
    with pytest.warns(UserWarning) as caught:
        pipeline(["red", *words, long + "circle", long + "blue"], negative="word3 white")
    truncated, unknown = (str(warning.message) for warning in caught)
    assert "this end was cut off: 'red red red red red red circle' (2 prompts are too long); chunks=2" in truncated
    assert f"lacks {', '.join(map(repr, words[:12]))} and 2 other words in 15 prompts, such as 'word0';" in unknown


def test_a_prompt_that_is_read_in_full_gives_no_warning(pipeline: Pipeline) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline(PROMPTS)
    assert not caught


def test_on_warning_receives_messages_in_place_of_python_warnings(pipeline: Pipeline) -> None:
    messages: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline("a purple circle", steps=1, on_warning=messages.append)
    assert len(messages) == 1 and "lacks 'purple'" in messages[0]


def test_between_interpolates_two_prompts_or_seeds(pipeline: Pipeline) -> None:
    prompts = [Between("a red circle", "blue", share) for share in (0.0, 0.5, 1.0)]
    seeds = [Between(1, 2, share) for share in (0.0, 0.5, 1.0)]
    result = pipeline(prompts, seeds=seeds)
    one, other = pipeline("a red circle", seeds=1).images, pipeline("blue", seeds=2).images
    assert distance(result.images[:1], one) <= 1 and distance(result.images[2:], other) <= 1
    assert min(distance(result.images[1:2], endpoint) for endpoint in (one, other)) > 1
    assert result.settings[1]["prompt"] == {"first": "a red circle", "second": "blue", "share": 0.5}
    assert result.settings[0]["batch"]["seeds"][1] == {"first": 1, "second": 2, "share": 0.5}
