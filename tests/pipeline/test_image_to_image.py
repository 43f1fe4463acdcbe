"""Image-to-image and inpainting."""

from typing import Any

import pytest
import torch

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import scaled_linear
from ldm.image import from_uint8, to_pil
from ldm.pipeline.pipeline import Pipeline
from ldm.random import normal
from tests.pipeline.tiny import IMAGE, PROMPTS, assembled, distance
from tests.tiny import tiny_inpainting_unet


def test_strength_1_from_pure_noise_ignores_the_source_image(pipeline: Pipeline) -> None:
    assert torch.equal(pipeline(PROMPTS, image=IMAGE, strength=1.0).images, pipeline(PROMPTS).images)


def test_strength_1_depends_on_the_source_image_unless_the_terminal_snr_is_zero(pipeline: Pipeline) -> None:
    other = assembled(pipeline, schedule=scaled_linear(), prediction=Prediction("v"))
    images = [other("red", image=image, strength=1.0).images for image in (IMAGE, 255 - IMAGE)]
    assert not torch.equal(*images)


def test_image_to_image_starts_at_the_noise_level_of_the_last_steps(pipeline: Pipeline) -> None:
    seen = []
    hook = pipeline.backbone.register_forward_hook(
        lambda module, args, out: seen.append((args[0][0], float(args[1][0])))
    )
    pipeline("red", image=IMAGE, strength=0.5, steps=5, seeds=3, guidance=1.0)
    hook.remove()
    assert [time for _, time in seen] == pytest.approx([400, 200])  # of 1000, 800, 600, 400, 200
    x0 = pipeline.first_stage.encode(from_uint8(IMAGE[None]))
    eps = normal(0, "initial noise", torch.tensor([3]), 0, (4, 8, 8))
    torch.testing.assert_close(seen[0][0], (0.6 * x0 + 0.4 * eps)[0])


def test_fixed_steps_runs_all_steps_from_the_noise_level_of_the_strength(pipeline: Pipeline) -> None:
    times = []
    hook = pipeline.backbone.register_forward_hook(lambda module, args, out: times.append(float(args[1][0])))
    result = pipeline("red", image=IMAGE, strength=0.5, steps=4, fixed_steps=True, guidance=1.0)
    hook.remove()
    assert times == pytest.approx([500, 375, 250, 125])
    assert result.settings[0]["fixed_steps"] is True and result.settings[0]["steps"] == 4
    without = pipeline("red", fixed_steps=True).images
    assert torch.equal(without, pipeline("red").images)  # it has no effect without a source image


def test_a_mask_that_repaints_everything_equals_image_to_image(pipeline: Pipeline) -> None:
    call: dict[str, Any] = {"image": IMAGE, "strength": 0.7, "sampler": "ddpm"}
    masked = pipeline(PROMPTS, mask=torch.full((1, 16, 16), 255, dtype=torch.uint8), **call)
    assert torch.equal(masked.images, pipeline(PROMPTS, **call).images)


def test_unmasked_pixels_are_those_of_the_source_image(pipeline: Pipeline) -> None:
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[..., 8:] = True
    images = pipeline(PROMPTS, image=IMAGE, mask=mask).images
    assert torch.equal(images[..., :8], IMAGE[..., :8].expand(5, 3, 16, 8))
    assert distance(images[..., 8:], IMAGE[..., 8:]) > 16


def test_images_and_masks_of_other_sizes_are_scaled_with_a_warning(pipeline: Pipeline) -> None:
    with pytest.warns(UserWarning) as caught:
        images = pipeline("red", image=to_pil(IMAGE)[0].resize((30, 20)), mask=to_pil(IMAGE)[0]).images
    assert [str(warning.message) for warning in caught] == [
        "the image is 20x30; it was scaled and cropped to the output size 16x16",
        "the mask is 16x16; it was scaled to the size of the image, 20x30",
    ]
    assert images.shape == (1, 3, 16, 16)


def test_each_image_may_have_its_own_negative_guidance_source_and_mask(pipeline: Pipeline) -> None:
    own: dict[str, list[Any]] = {
        "negative": ["blue", "", "white"],
        "guidance": [3.0, 1.0, 5.0],
        "image": [IMAGE, 255 - IMAGE, IMAGE],
        "mask": [mask[None] for mask in IMAGE],
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
        image=IMAGE,
        strength=0.5,
        steps=4,
        batch_size=1,
        on_step=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 4) for done in range(1, 5)]


def inpainting(pipeline: Pipeline) -> Pipeline:
    return assembled(pipeline, backbone=tiny_inpainting_unet())


def test_inpainting_weights_receive_the_mask_and_the_masked_image(pipeline: Pipeline) -> None:
    seen = []
    inpaint = inpainting(pipeline)
    hook = inpaint.backbone.conv_in.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[..., 8:] = True
    images = inpaint(PROMPTS[:2], image=IMAGE, mask=mask, steps=2).images
    hook.remove()
    kept = from_uint8(IMAGE[None]) * ~mask
    expected = torch.cat((mask[None, :, ::2, ::2].float(), pipeline.first_stage.encode(kept)), dim=1)
    torch.testing.assert_close(seen[0][:, 4:], expected.expand(2, -1, -1, -1))
    assert torch.equal(images[..., :8], IMAGE[..., :8].expand(2, 3, 16, 8))


def test_inpainting_weights_start_from_noise_without_an_image_or_at_strength_1(pipeline: Pipeline) -> None:
    inpaint, white = inpainting(pipeline), torch.ones(1, 16, 16, dtype=torch.bool)
    from_noise = inpaint("red").images
    assert torch.equal(inpaint("red", image=IMAGE, mask=white).images, from_noise)
    assert torch.equal(inpaint("red", image=IMAGE, strength=1.0).images, from_noise)
    half = {"strength": 0.5, "fixed_steps": True}
    assert distance(inpaint("red", image=IMAGE, **half).images, inpaint("red", image=255 - IMAGE, **half).images) > 1
