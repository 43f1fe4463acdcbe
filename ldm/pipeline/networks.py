"""Runs the networks of a pipeline on their device: encodes, denoises and decodes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser, Network
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.execution.compiling import compiled
from ldm.execution.cpu_packing import can_pack, fold, pack, unpack
from ldm.execution.offload import Offload
from ldm.image import to_uint8
from ldm.nn.backbone import Backbone, check_inputs
from ldm.nn.inpainting import INPAINTING
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.vae import VAE
from ldm.pipeline.loading import place_frozen
from ldm.sampling.compatibility import Setup, check
from ldm.weights.model import Model


class Networks:
    """A denoising network, the first stage and text encoder that it was trained with, and the device they run on.

    The networks must already have the dtype and, without `offload`, the device that they run in. `weak` are those of a
    worse model of the same data, see `Pipeline`. Raises ValueError for incompatible components.
    """

    def __init__(
        self,
        backbone: Backbone,
        first_stage: VAE,
        text_encoder: TextEncoder,
        schedule: Schedule,
        prediction: Prediction,
        time: str | None = None,
        weak: "Networks | None" = None,
        offload: Offload | None = None,
        compile: bool = False,
    ) -> None:
        check_inputs(backbone, first_stage.latent_channels, text_encoder.widths)
        self.backbone, self.first_stage, self.text_encoder = backbone, first_stage, text_encoder
        self.weak, self.inpaints = weak, INPAINTING in backbone.reads
        self.offload = offload or Offload(backbone.device)
        self._run: Network = compiled(backbone, self.offload) if compile else backbone
        self.denoiser = Denoiser(self._network, schedule, prediction, time)
        check(Setup(schedule, prediction, time=self.denoiser.time))

    @property
    def device(self) -> torch.device:
        return self.offload.device

    @property
    def backbones(self) -> list[Backbone]:
        """The denoising network and, if there is one, the weak one."""
        return [networks.backbone for networks in self._both()]

    def denoising(self) -> AbstractContextManager[None]:
        """A context in which the denoiser, and the weak one, can be called."""
        return self.offload.using(*self.backbones)

    def encode(self, images: Tensor, tile: int = 0) -> Tensor:
        """Encodes images in [-1, 1] to scaled latents."""
        with self.offload.using(self.first_stage):
            return self.first_stage.encode(images, tile=tile)

    def decode(self, latents: Tensor, tile: int = 0) -> Tensor:
        """Decodes latents to images, uint8 (b, 3, h, w)."""
        with self.offload.using(self.first_stage):
            return to_uint8(self.first_stage.decode(latents, tile))

    def take(self, model: Model) -> None:
        """Takes over the weights of a model; the denoising network stays the same object, packed or compiled."""
        self.backbone.load_state_dict(model.backbone.state_dict())
        self.text_encoder = model.text_encoder.network

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Runs all networks on the device and in the dtype from now on."""
        self.offload = Offload(device, self.offload.mode)
        unpack(self.first_stage)
        place_frozen(self.first_stage, self.text_encoder, self.offload.idle_device, dtype)
        if can_pack(device, dtype):
            fold(self.first_stage)
        for networks in self._both():
            networks.offload = self.offload
            unpack(networks.backbone)
            networks.backbone.to(self.offload.idle_device, dtype)
            if can_pack(device, dtype) and networks._run is networks.backbone:
                pack(networks.backbone)

    def _both(self) -> "Iterator[Networks]":
        yield self
        if self.weak is not None:
            yield self.weak

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self._run(x.to(self.backbone.dtype), time, conditioning)
