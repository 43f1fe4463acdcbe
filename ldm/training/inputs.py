"""Encodes a batch of images and captions to what a denoising network is trained on: latents and conditioning."""

from collections.abc import Callable, Container
from functools import cached_property, partial

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.nn.inpainting import INPAINTING, inpainting_hint
from ldm.nn.text_encoder import TextEncoder, tokens_of
from ldm.nn.vae import VAE
from ldm.random import normal
from ldm.training.batch import Batch, as_float
from ldm.training.masks import random_masks


class BatchEncoder:
    """Encodes batches for a network that reads the hints `reads`, see `ldm.nn.backbone.Backbone`.

    All randomness is keyed by (`seed`, stream, id, draw). The text encoder gets gradients if it is trained. This is no
    torch module, so that the networks stay out of checkpoints.
    """

    def __init__(
        self, first_stage: VAE, text_encoder: TextEncoder, reads: Container[str], seed: int, trains_text: bool
    ) -> None:
        self.first_stage, self.text_encoder = first_stage, text_encoder
        self.inpaints, self.seed, self.trains_text = INPAINTING in reads, seed, trains_text

    def __call__(self, batch: Batch, dropped: Tensor | None = None) -> tuple[Tensor, Conditioning]:
        """Returns latents and conditioning; the captions where `dropped` (b,) is true count as empty."""
        conditioning = self.conditioning(batch, dropped)
        if self.inpaints:
            conditioning = conditioning.with_hint(INPAINTING, self.hint(batch))
        return self.latents(batch), conditioning

    @property
    def device(self) -> torch.device:
        return self.first_stage.scale.device

    @property
    def tokenize(self) -> Callable[[list[str]], Tensor]:
        """Maps captions to tokens (b, n). It holds no network, so that it can be sent to a data loader's workers."""
        return partial(tokens_of, self.text_encoder.tokenizers)

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """Samples scaled latents (b, z, h, w) from the posterior."""
        moments = batch["moments"] if "moments" in batch else self.first_stage.moments(as_float(batch["image"]))
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        noise = normal(self.seed, "posterior", batch["id"], batch["draw"], shape)
        return self.first_stage.latents(moments, noise)

    @cached_property
    def unconditional(self) -> Conditioning:
        """The conditioning of the empty caption for a single sample."""
        with torch.inference_mode(False), torch.no_grad():  # validation may be the first caller
            return self.text_encoder.encode([""], device=self.device)

    @cached_property
    def empty_tokens(self) -> Tensor:
        """The tokens (1, n) of the empty caption."""
        with torch.inference_mode(False):
            return self.tokenize([""]).to(self.device)

    def conditioning(self, batch: Batch, dropped: Tensor | None = None) -> Conditioning:
        """Returns the conditioning without hints; the captions where `dropped` (b,) is true count as empty."""
        if "states" in batch:
            cached = Conditioning(text=batch["states"].to(self.unconditional.get("text").dtype))
            return cached if dropped is None else cached.dropped(dropped, self.unconditional)
        tokens = batch["tokens"] if "tokens" in batch else self.tokenize(batch["caption"])
        tokens = tokens.to(self.device)
        if dropped is not None:
            tokens = torch.where(dropped[:, None], self.empty_tokens, tokens)
        with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
            return self.text_encoder.encode(tokens, device=self.device)

    @torch.no_grad()
    def hint(self, batch: Batch) -> Tensor:
        """Returns random masks and the latents of the masked images, for an inpainting network."""
        images = as_float(batch["image"])
        masks = random_masks(self.seed, batch["id"], batch["draw"], (images.shape[2], images.shape[3]))
        return inpainting_hint(images, masks, self.first_stage.factor, self.first_stage.encode)
