"""Samples images from a LightningModule during training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.find import find
from ldm.callbacks.images.as_exported import as_exported
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.nn.backbone import Backbone
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.vae import VAE
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.settings import Settings

SampleImages = Callable[[list[str], list[int]], Tensor]  # (prompts, seeds) → uint8 (n, 3, h, w)


class SampledModule(Protocol):
    """The attributes that sampling needs from a LightningModule; `sampling` holds its Settings except the size."""

    backbone: Backbone
    schedule: Schedule
    prediction: Prediction
    denoiser: Denoiser
    sampling: dict[str, Any]
    size: tuple[int, int]
    seed: int

    @property
    def first_stage(self) -> VAE: ...
    @property
    def text_encoder(self) -> TextEncoder: ...


@contextmanager
def cached_casts() -> Iterator[None]:
    """Makes autocast cast each weight once in the context; Lightning's would cast all weights in each call."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def image_sampler(trainer: Trainer, module: LightningModule) -> Iterator[SampleImages]:
    """Yields a function that samples with the run's settings and precision, and with EMA weights if there are any.

    Adapters are those of the file that the run would export, see `as_exported`.
    """
    model = cast(SampledModule, module)
    height, width = model.size
    pipeline = Pipeline(
        model.backbone,
        model.first_stage,
        model.text_encoder,
        model.schedule,
        model.prediction,
        Settings((height, width), **model.sampling),
        model.denoiser.time,
    )

    def sample(prompts: list[str], seeds: list[int]) -> Tensor:
        return pipeline(prompts, seeds=seeds, batch_size=len(prompts)).images

    ema, speed, training = find(trainer, EMA), find(trainer, Throughput), model.backbone.training
    with ema.swapped(module) if ema else nullcontext(), trainer.precision_plugin.forward_context(), cached_casts():
        model.backbone.eval()
        try:
            with as_exported(trainer, module, model.backbone, model.text_encoder):
                yield sample
        finally:
            model.backbone.train(training)
            if speed is not None:
                speed.pause()
