"""Trains a VAE first stage to reconstruct images, with a KL penalty and noise on the latents."""

from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from ldm.image import psnr
from ldm.nn.backbone import trainable
from ldm.nn.vae import VAE
from ldm.random import normal, uniform
from ldm.training.batch import Batch, as_float
from ldm.training.export import ExportedFile
from ldm.training.optim import Curve, MakeOptimizer, with_curve
from ldm.training.training_module import TrainingModule
from ldm.training.validation import log_validation
from ldm.weights.native import check_fits


class AutoencoderTraining(TrainingModule):
    """Minimises L1 + L2 on pixels plus `kl_weight` times the KL divergence to a standard normal, per latent element.

    Half of the images get extra noise on their latents, of a random scale up to `noise` times the latents' standard
    deviation, so that the decoder learns to reconstruct sharp images from the inexact latents of a diffusion model
    (Yang et al. 2025, "Latent denoising makes good visual tokenizers"). With `decoder_only` the encoder is frozen, and
    existing latents stay valid.
    """

    def __init__(
        self,
        vae: VAE,
        optimizer: MakeOptimizer,
        lr: Curve,
        kl_weight: float = 1e-3,
        noise: float = 0.5,
        decoder_only: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if decoder_only:
            vae.encoder.requires_grad_(False)
            vae.quant.requires_grad_(False)
        self.vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.make_optimizer, self.curve = optimizer, lr
        self.kl_weight, self.noise, self.seed = kl_weight, noise, seed

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return with_curve(self.make_optimizer, self.trainable().values(), self.curve, self.trainer)

    def trainable(self) -> dict[str, nn.Parameter]:
        return trainable(self.vae)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_fits(self, checkpoint["state_dict"], "the checkpoint")

    def training_step(self, batch: Batch, _: int) -> Tensor:
        image, ids, draw = as_float(batch["image"]), batch["id"], batch["draw"]
        mean, log_variance = self.vae.moments(image).chunk(2, dim=1)
        size, chance = uniform(self.seed, "noise size", ids, draw, (2,)).float()[:, :, None, None, None].unbind(1)
        extra = self.noise * mean.std((1, 2, 3), keepdim=True) * size * (chance < 0.5)  # (b, 1, 1, 1)
        posterior, noise = (normal(self.seed, key, ids, draw, mean.shape[1:]) for key in ("posterior", "noise"))
        latents = mean + (log_variance / 2).exp() * posterior + extra * noise
        error = self.vae.decode((latents - self.vae.shift) * self.vae.scale) - image
        reconstruction = error.abs().mean() + error.square().mean()
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        loss: Tensor = reconstruction + self.kl_weight * kl
        self.means.add(loss=loss, reconstruction=reconstruction, kl=kl)
        return loss

    def validation_step(self, batch: Batch, _: int, dataloader_idx: int = 0) -> None:
        image = as_float(batch["image"])
        decoded = self.vae.decode(self.vae.encode(image)).clamp(-1, 1)
        log_validation(self, dataloader_idx, {"psnr": psnr(decoded, image)})

    @property
    def validation_meaning(self) -> dict[str, Any]:
        """Empty, because the meaning of a PSNR depends on the data only."""
        return {}

    @torch.no_grad()
    def exported_files(self) -> list[ExportedFile]:
        """Returns the autoencoder, with latents normalised by their mean and standard deviation per channel over the
        first validation set."""
        batches = [as_float(batch["image"]).to(self.device) for batch in self.trainer.datamodule.val_dataloader()[0]]  # type: ignore[attr-defined]
        means = torch.cat([self.vae.moments(image).chunk(2, dim=1)[0] for image in batches])
        config = {
            **self.vae.config,
            "shift": [round(x, 4) for x in means.mean((0, 2, 3)).tolist()],
            "scale": [round(1 / x, 4) for x in means.std((0, 2, 3)).tolist()],
        }
        return [ExportedFile("vae", self.vae.state_dict(), {"kind": "vae", "config": config})]
