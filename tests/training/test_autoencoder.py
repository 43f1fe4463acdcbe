from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.image import psnr
from ldm.nn.vae import VAE
from ldm.random import normal
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.optim import constant
from ldm.weights.native import load_network, save_network
from tests.tiny import tiny_vae
from tests.training.tiny import ADAM, Images, batch, fit, logged


def training(vae: VAE | None = None, **how: Any) -> AutoencoderTraining:
    return AutoencoderTraining(vae or tiny_vae(), ADAM, constant(), **how)


def with_moments(module: AutoencoderTraining, mean: float, log_variance: float, ids: int) -> Tensor:
    """Replaces the encoder by one that returns these moments for every image; returns them."""
    halves = torch.full((ids, 4, 4, 4), mean), torch.full((ids, 4, 4, 4), log_variance)
    moments = torch.cat(halves, dim=1)
    module.vae.moments = lambda _: moments
    return moments


def test_without_kl_and_noise_the_loss_is_l1_plus_l2_of_the_reconstruction() -> None:
    module, images = training(kl_weight=0.0, noise=0.0), batch(0, 1, 2)
    image = images["image"].float() / 127.5 - 1
    noise = normal(0, "posterior", images["id"], images["draw"], (4, 4, 4))
    error = tiny_vae().decode(tiny_vae().encode(image, noise)) - image
    torch.testing.assert_close(module.training_step(images, 0), error.abs().mean() + error.square().mean())


def test_the_kl_term_is_the_divergence_of_the_posterior_from_a_standard_normal() -> None:
    module = training(kl_weight=2.0)
    moments = with_moments(module, 0.5, -1.0, 2)
    loss = module.training_step(batch(0, 1), 0)
    values = logged(module)
    mean, log_variance = moments.chunk(2, dim=1)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(values["train/kl"], expected)
    torch.testing.assert_close(loss, values["train/reconstruction"] + 2 * expected)


def test_half_of_the_images_are_decoded_from_latents_with_noise_of_random_scale() -> None:
    module, n, std, seen = training(noise=0.8), 400, 5.0, list[Tensor]()
    mean = std * torch.tensor([-1.0, 1.0]).repeat(n, 4, 4, 2)
    module.vae.moments = lambda _: torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)
    module.vae.decode = lambda latents: seen.append(latents) or torch.zeros(n, 3, 8, 8)  # type: ignore[func-returns-value]
    images = {"image": torch.zeros(n, 3, 8, 8, dtype=torch.uint8), "id": torch.arange(n), "draw": torch.zeros(n).long()}
    module.training_step(images, 0)
    sizes = (seen[0] / module.vae.scale + module.vae.shift - mean).flatten(1).std(1) / std
    noisy = sizes[sizes > 1e-4]
    assert abs(len(noisy) - n / 2) < 4 * (n / 4) ** 0.5
    assert noisy.mean() == pytest.approx(0.4, abs=0.08) and 0.6 < noisy.max() < 1.1


def test_training_only_the_decoder_does_not_change_the_latents(tmp_path: Path) -> None:
    module = training(decoder_only=True)
    latents, images = module.vae.moments(torch.zeros(1, 3, 8, 8)), module.vae.decode(torch.zeros(1, 4, 4, 4))
    fit(tmp_path, module)
    torch.testing.assert_close(module.vae.moments(torch.zeros(1, 3, 8, 8)), latents, rtol=0, atol=0)
    assert not torch.equal(module.vae.decode(torch.zeros(1, 4, 4, 4)), images)


def test_the_loss_of_a_batch_is_the_mean_of_its_samples() -> None:
    module = training()
    alone = torch.stack([module.training_step(batch(i), 0) for i in range(3)])
    torch.testing.assert_close(module.training_step(batch(2, 0, 1), 0), alone.mean())
    assert (module.training_step(batch(0, draw=1), 0) - alone[0]).abs() > 1e-4


def test_the_exported_autoencoder_has_latents_of_zero_mean_and_unit_std(tmp_path: Path) -> None:
    module = training()
    fit(tmp_path, module)
    (file,) = module.exported_files()
    save_network(tmp_path / "vae.safetensors", state=file.state, **file.about)
    vae = cast(VAE, load_network(tmp_path / "vae.safetensors", "vae"))
    images = torch.stack([Images(6, seed=1)[index]["image"] for index in range(6)]).float() / 127.5 - 1
    latents = vae.encode(images)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=5e-3)  # rounded to four decimals
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=5e-3, atol=0)
    plain = module.vae.decode(module.vae.encode(images))
    torch.testing.assert_close(vae.decode(latents), plain, rtol=1e-3, atol=1e-3)


def test_validation_measures_the_psnr_of_reconstructions(tmp_path: Path) -> None:
    module = training()
    trainer = fit(tmp_path, module, steps=4)
    images = torch.stack([Images(6, seed=1)[index]["image"] for index in range(6)]).float() / 127.5 - 1
    expected = psnr(module.vae.decode(module.vae.encode(images)).clamp(-1, 1), images).mean()
    torch.testing.assert_close(trainer.callback_metrics["val/pictures/psnr"], expected.detach(), rtol=1e-4, atol=0)
