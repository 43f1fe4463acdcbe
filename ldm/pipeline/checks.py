"""Refuses settings that the networks of a pipeline cannot be sampled with, and weak models that do not fit."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ldm.nn.backbone import check_size
from ldm.pipeline.networks import Networks
from ldm.pipeline.prompts import SYNTAXES
from ldm.pipeline.settings import Settings
from ldm.sampling.compatibility import Setup, check
from ldm.sampling.thresholding import get_thresholding
from ldm.weights.model import Model


def check_settings(networks: Networks, settings: Settings, batch_size: int, warn: Callable[[str], None]) -> None:
    """Raises ValueError for unsuitable settings; `warn` reports those that are suitable but not advisable."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be 1 or more")
    for backbone in networks.backbones:
        check_size(backbone, networks.first_stage.factor, settings.size)
    if settings.chunks < 1:
        raise ValueError(f"chunks is {settings.chunks}, but must be 1 or more")
    if settings.prompt_syntax not in SYNTAXES:
        raise ValueError(f"prompt_syntax is {settings.prompt_syntax!r}, but must be one of {', '.join(SYNTAXES)}")
    networks.text_encoder.check_skip(settings.clip_skip)
    networks.first_stage.check_tile(settings.tile)
    get_thresholding(settings.thresholding, settings.thresholding_options)
    denoiser = networks.denoiser
    check(Setup(denoiser.schedule, denoiser.prediction, sampling=asdict(settings)), warn)


def check_weak(model: Model, weak: Model) -> None:
    """Raises ValueError for a weak model with other noisy latents or another conditioning."""
    weak_inputs = _inputs(weak)
    for name, expected in _inputs(model).items():
        if weak_inputs[name] != expected:
            raise ValueError(
                f"the weak model {weak.source} has another {name} than {model.source}: give one that has the same"
            )


def _inputs(model: Model) -> dict[str, Any]:
    about = model.about["model"]
    return {
        "schedule": about["schedule"],
        "first stage": about["first_stage"]["fingerprint"],
        "text encoder": about["text_encoder"]["fingerprint"],
        "conditioning": model.backbone.reads,
        "number of latent channels": model.backbone.latent_channels,
    }
