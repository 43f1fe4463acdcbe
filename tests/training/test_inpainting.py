"""Tests training of inpainting networks: their inputs, and the data that they can be trained on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

import train
from ldm.callbacks.export import Export
from ldm.metrics.noise_loss import encoded
from ldm.nn.backbone import check_inputs
from ldm.nn.inpainting import INPAINTING, inpainting_hint
from ldm.nn.unet import UNet
from ldm.training.diffusion import DiffusionTraining
from ldm.training.masks import random_masks
from ldm.weights.native import load_network
from tests.runs import ALONE, TINY, refusal, run
from tests.tiny import tiny_inpainting_unet, tiny_vae
from tests.training.tiny import Images, batch, diffusion, fit


def inpainting(**how: Any) -> DiffusionTraining:
    return diffusion(backbone=tiny_inpainting_unet().train(), **how)


def test_the_configured_inpainting_model_fits_its_first_stage_and_text_encoder() -> None:
    with initialize_config_dir(str(train.CONF / "model"), version_base="1.3"):
        settings = dict(compose("sd15_inpainting"))
    assert settings.pop("_target_") == "ldm.nn.unet.UNet"
    with torch.device("meta"):
        unet = UNet(**settings)  # type: ignore[arg-type]
    check_inputs(unet, 4, {"text": 768})
    assert unet.reads == {"text": 768, INPAINTING: 5} and unet.latent_channels == 4


def test_training_changes_only_the_inpainting_network(tmp_path: Path) -> None:
    module = inpainting()
    fit(tmp_path, module, steps=3, callbacks=[Export(tmp_path)])
    before, after = tiny_inpainting_unet().state_dict(), module.backbone.state_dict()
    assert not torch.equal(before["conv_in.weight"][:, 4:], after["conv_in.weight"][:, 4:])  # the hint's channels
    assert torch.equal(module.first_stage.encoder.conv_in.weight, tiny_vae().encoder.conv_in.weight)
    exported = load_network(tmp_path / "unet.safetensors", "unet").state_dict()
    assert all(torch.equal(exported[name], weight) for name, weight in after.items())


def test_the_loss_depends_on_the_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    module = inpainting()
    first = module.losses(batch(0, 1))[1]
    assert torch.equal(first, module.losses(batch(0, 1))[1])
    monkeypatch.setattr("ldm.training.inputs.random_masks", lambda *_: torch.ones(2, 1, 8, 8))
    assert not (module.losses(batch(0, 1))[1] == first).any()


def test_the_network_gets_the_masks_and_latents_of_the_masked_images() -> None:
    module, seen, images = inpainting(), list[Tensor](), batch(0, 1, draw=3)
    module.backbone.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    module.losses(images)
    masks = random_masks(0, images["id"], images["draw"], (8, 8))
    kept = (images["image"].float() / 127.5 - 1) * (1 - masks)
    expected = torch.cat([masks[:, :, ::2, ::2], tiny_vae().encode(kept)], dim=1)
    torch.testing.assert_close(seen[0][:, 4:], expected, rtol=1e-5, atol=1e-5)


def test_each_epoch_masks_an_image_differently() -> None:
    module = inpainting()
    hints = [module.inputs.hint(batch(*range(8), draw=draw))[:, :1] for draw in (0, 0, 1)]
    assert torch.equal(hints[0], hints[1]) and not torch.equal(hints[0], hints[2])


def test_validation_masks_an_image_the_same_way_in_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr("ldm.training.diffusion.log_validation", lambda *args: seen.append(args[2]["loss"]))
    module = inpainting()
    for draw in (1, 2):
        module.validation_step(batch(0, 1, draw=draw), 0)
    assert torch.equal(*seen)


def test_a_hint_is_the_mask_at_latent_size_and_the_latents_of_the_masked_image() -> None:
    images, masks = torch.rand(2, 3, 8, 8) * 2 - 1, torch.zeros(2, 1, 8, 8)
    masks[0, :, :4] = 1
    hint = inpainting_hint(images, masks, 2, lambda masked: masked[:, :, ::2, ::2])
    assert torch.equal(hint[0, 0], torch.tensor([1.0, 1, 0, 0]).view(4, 1).expand(4, 4)) and not hint[1, 0].any()
    assert not hint[0, 1:, :2].any() and torch.equal(hint[1, 1:], images[1, :, ::2, ::2])


@pytest.mark.parametrize("channels", [5, 8])
def test_a_network_with_unsupported_input_channels_is_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"takes {channels} input channels, but must take 4 or, for inpainting, 9"):
        diffusion(backbone=tiny_inpainting_unet(channels=channels))


def test_a_run_on_cached_latents_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, *TINY, *ALONE, "model.in_channels=17", "trainer.max_steps=1")
    assert message.startswith("an inpainting network is trained on images") and "data=shapes_online" in message


def test_a_run_on_images_trains_samples_and_evaluates(tmp_path: Path) -> None:
    images = (
        "data=shapes_online",
        "data.length=32",
        "model.in_channels=17",
        "evaluation.prompts=4",
        "evaluation.count=8",
    )
    small = [setting for setting in TINY if "data.count" not in setting]
    run(tmp_path, *small, *images, *ALONE[1:], "trainer.max_steps=2")
    assert (tmp_path / "unet.safetensors").is_file() and (tmp_path / "samples" / "final.png").is_file()


def test_the_loss_by_noise_level_is_measured_with_a_full_mask() -> None:
    module = inpainting()
    ((_, conditioning, _),) = encoded(module, [Images()[0], Images()[1]], 2, torch.device("cpu"))
    hint = conditioning.get(INPAINTING)
    assert (hint[:, 0] == 1).all()
    torch.testing.assert_close(hint[:, 1:], tiny_vae().encode(torch.zeros(2, 3, 8, 8)))
