"""Compares complete pipelines of ldm and diffusers on tiny random networks and equal noise: 60 dB in float32."""

import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

from ldm.image import from_uint8, to_pil
from ldm.pipeline.batch import sampling_grid
from ldm.pipeline.pipeline import Pipeline
from ldm.random import normal
from ldm.weights.convert import write
from tests.weights.foreign import ODD, full_model

WORDS = ODD | {"text_tower": ODD["text_tower"] | {"vocab_size": 49408}}
NINE = WORDS | {"unet": ODD["unet"] | {"in_channels": 9}}
PICTURE = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
MASK = torch.zeros(1, 16, 16, dtype=torch.bool)
MASK[:, 4:, 6:12] = True
SEED, SHAPE = torch.tensor([5]), (4, 8, 8)
EPS = normal(0, "initial noise", SEED, 0, SHAPE)
SETTINGS: dict[str, Any] = {"sampler": "ddim", "spacing": "leading", "steps": 10}
SDE = {"algorithm_type": "sde-dpmsolver++"}
# Our sampler, its spacing and options; diffusers' scheduler and its settings.
SAMPLERS: list[tuple[str, str, dict[str, Any], str, dict[str, Any]]] = [
    ("ddpm", "leading", {}, "DDPMScheduler", {"clip_sample": False}),
    ("ddim", "leading", {}, "DDIMScheduler", {"set_alpha_to_one": True, "clip_sample": False}),
    ("ddim", "trailing", {"eta": 0.0}, "DDIMScheduler", {"set_alpha_to_one": True, "clip_sample": False}),
    ("euler", "trailing", {}, "EulerDiscreteScheduler", {}),
    ("euler_a", "trailing", {}, "EulerAncestralDiscreteScheduler", {}),
    ("heun", "trailing", {}, "HeunDiscreteScheduler", {}),
    ("lms", "trailing", {}, "LMSDiscreteScheduler", {}),
    ("pndm", "leading", {"prk": False}, "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("dpmpp_2m", "trailing", {}, "DPMSolverMultistepScheduler", {}),
    ("dpmpp_3m", "trailing", {"curvature": "half"}, "DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("dpmpp_2m_sde", "trailing", {}, "DPMSolverMultistepScheduler", SDE),
    ("unipc", "trailing", {}, "UniPCMultistepScheduler", {}),
    ("deis", "trailing", {"order": 2, "variable": "log_ratio"}, "DEISMultistepScheduler", {}),
]
PER_ALPHA = {"euler", "euler_a", "heun", "lms"}  # whose peers hold x / alpha


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, networks in (("four", WORDS), ("nine", NINE)):
        write(full_model(networks), path / name, "diffusers")
    return path


def latents(pipeline: Pipeline, **call: Any) -> Tensor:
    """Returns the latents that the first stage decodes."""
    seen, scale = [], pipeline.first_stage.scale
    hook = pipeline.first_stage.post_quant.register_forward_pre_hook(lambda module, args: seen.append(args[0] * scale))
    pipeline("a red circle", seeds=5, size=(16, 16), guidance=3.0, negative="blue", **call)
    hook.remove()
    return seen[0]


def shared(pipeline: Pipeline, steps: int) -> dict[str, Any]:
    """The same call to diffusers, with our text encoder's states."""
    with torch.no_grad():
        text = pipeline.text_encoder.encode(["a red circle", "blue"]).get("text")
    return {
        "prompt_embeds": text[:1],
        "negative_prompt_embeds": text[1:],
        "guidance_scale": 3.0,
        "num_inference_steps": steps,
        "output_type": "latent",
    }


def assert_60_db(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).square().mean().sqrt() < 1e-3 * (expected.max() - expected.min())


@pytest.mark.parametrize(
    ("sampler", "spacing", "options", "scheduler", "settings"),
    [  # each scheduler is compared step by step in test_schedulers.py
        *SAMPLERS[:4],
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SAMPLERS[4:]),
    ],
)
def test_text_to_image(
    sampler: str,
    spacing: str,
    options: dict[str, Any],
    scheduler: str,
    settings: dict[str, Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = Pipeline.load(str(folder / "four"), "cpu")
    how = {"sampler": sampler, "spacing": spacing, "sampler_options": options, "steps": 10}
    sampled = latents(ours, **how)

    pipe = StableDiffusionPipeline.from_pretrained(folder / "four", local_files_only=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(
        pipe.scheduler.config, timestep_spacing=spacing, **settings
    )
    draws = iter(range(100))
    module = sys.modules[type(pipe.scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: normal(0, "step noise", SEED, next(draws), SHAPE))
    pipe.scheduler.set_timesteps(10)
    first = sampling_grid(ours.denoiser.schedule, ours.settings.overridden(how), None).points[0]
    start = (first.ratio if sampler in PER_ALPHA else first.sigma) * EPS
    expected = pipe(latents=start / pipe.scheduler.init_noise_sigma, **shared(ours, 10)).images
    assert_60_db(sampled, expected)
    assert (expected - start).abs().mean() > 0.1


def test_text_to_image_by_the_seed_of_diffusers(folder: Path) -> None:
    ours = Pipeline.load(str(folder / "four"), "cpu")
    sampled = latents(ours, sampler="euler_a", spacing="trailing", steps=10, noise="diffusers")
    pipe = StableDiffusionPipeline.from_pretrained(folder / "four", local_files_only=True)
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    generator = torch.Generator().manual_seed(5)
    assert_60_db(sampled, pipe(generator=generator, height=16, width=16, **shared(ours, 10)).images)


def changing(kind: type, model: Path, monkeypatch: pytest.MonkeyPatch, eps: Tensor) -> Any:
    """A diffusers pipeline that uses `eps` as its noise."""
    pipe = kind.from_pretrained(model, local_files_only=True)  # type: ignore[attr-defined]
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True, timestep_spacing="leading")
    monkeypatch.setattr(sys.modules[kind.__module__], "randn_tensor", lambda shape, **_: eps.expand(shape))
    return pipe


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image(strength: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Pipeline.load(str(folder / "four"), "cpu")
    sampled = latents(ours, image=PICTURE[0], strength=strength, **SETTINGS)
    pipe = changing(StableDiffusionImg2ImgPipeline, folder / "four", monkeypatch, EPS)
    with torch.no_grad():
        x0 = ours.first_stage.encode(from_uint8(PICTURE))
    expected = pipe(image=x0, strength=strength, **shared(ours, 10)).images
    assert_60_db(sampled, expected)
    assert (expected - x0).abs().mean() > 0.1 * x0.abs().mean()


@pytest.mark.parametrize(("weights", "strength"), [("four", 0.75), ("nine", 0.75), ("nine", 1.0)])
def test_inpainting(weights: str, strength: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By blending in latents, and by weights of 9 channels; at strength 1 from noise alone, which is sigma·eps here."""
    ours = Pipeline.load(str(folder / weights), "cpu")
    sampled = latents(ours, image=PICTURE[0], mask=MASK, strength=strength, **SETTINGS)
    settings = ours.settings.overridden({"spacing": "leading", "steps": 10})
    first = sampling_grid(ours.denoiser.schedule, settings, strength).points[0]
    eps = EPS * first.sigma if strength == 1 else EPS
    pipe = changing(StableDiffusionInpaintPipeline, folder / weights, monkeypatch, eps)
    with torch.no_grad():
        x0, kept = (ours.first_stage.encode(picture) for picture in (from_uint8(PICTURE), from_uint8(PICTURE) * ~MASK))
    expected = pipe(
        image=x0,
        mask_image=to_pil((MASK.to(torch.uint8) * 255).expand(3, -1, -1))[0],
        masked_image_latents=kept,
        height=16,
        width=16,
        strength=strength,
        **shared(ours, 10),
    ).images
    assert_60_db(sampled, expected)
    assert (expected - x0).abs().mean() > 0.1 * x0.abs().mean()
