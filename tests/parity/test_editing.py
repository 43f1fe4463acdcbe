"""Image-to-image by whole pipelines, ours and diffusers', on tiny random networks and the same noise."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as theirs

from ldm.image import from_uint8
from ldm.pipeline import Pipeline
from ldm.random import normal
from ldm.weights.convert import write
from tests.weights.foreign import ODD, whole_model

WORDS = ODD | {"text_tower": ODD["text_tower"] | {"vocab_size": 49408}}
PICTURE = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_draws_what_diffusers_does(
    strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(whole_model(WORDS), tmp_path / "m", "diffusers")
    ours = Pipeline.load(str(tmp_path / "m"), "cpu")
    call = {"strength": strength, "guidance": 3.0, "sampler": "ddim", "spacing": "leading", "steps": 10}
    seen, scale = [], ours.first_stage.scale
    ours.first_stage.post_quant.register_forward_pre_hook(lambda module, args: seen.append(args[0] * scale))
    ours("a red circle", image=PICTURE[0], seeds=5, size=(16, 16), **call)

    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True, timestep_spacing="leading")
    eps = normal(0, "initial noise", torch.tensor([5]), 0, (4, 8, 8))
    monkeypatch.setattr(theirs, "randn_tensor", lambda shape, **_: eps.expand(shape))
    with torch.no_grad():
        context = ours.text_encoder(ours.tokenizer(["a red circle", ""]))
        latents = ours.first_stage.encode(from_uint8(PICTURE))
    expected = pipe(
        image=latents,
        strength=strength,
        guidance_scale=3.0,
        num_inference_steps=10,
        prompt_embeds=context[:1],
        negative_prompt_embeds=context[1:],
        output_type="latent",
    ).images
    assert (seen[0] - expected).square().mean().sqrt() < 1e-3 * expected.abs().max()  # PSNR > 60 dB
    assert (expected - latents).abs().mean() > 0.1 * latents.abs().mean()
