"""Says which weights of a diffusion model are trained, and describes the model as plain data."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ldm.adapters.adapter import Adapter
from ldm.adapters.text import TextualInversion
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.nn.backbone import Backbone, trainable
from ldm.nn.text_encoder import TextEncoder

PREFIX = "backbone."  # prefix of the network's weights in checkpoints
TEXT_PREFIX = "trained_text."  # prefix of the text encoder's weights, if it is trained


@dataclass(frozen=True)
class TrainedModel:
    """A denoising network and a text encoder in training, and everything else that sampling from them needs.

    `sources` has the "weights" and "fingerprint" of the "first_stage" and of the "text_encoder", and `base` those of
    the weights that training started from. `sampling` are the default settings of sampling, and `adapter` is the
    adapter applied to the network.
    """

    backbone: Backbone
    text_encoder: TextEncoder
    sources: dict[str, dict[str, Any]]
    schedule: Schedule
    prediction: Prediction
    time: str
    size: tuple[int, int]
    sampling: dict[str, Any]
    adapter: Adapter | None = None
    base: dict[str, str] | None = None
    trains_text: bool = False

    def trainable(self) -> dict[str, nn.Parameter]:
        """Returns the weights that are trained, averaged, saved and exported, by name."""
        return trainable(self.backbone) | self.trainable_text()

    def trainable_text(self) -> dict[str, nn.Parameter]:
        """Returns the weights of the text encoder that are trained, by name."""
        return {TEXT_PREFIX + name: weight for name, weight in trainable(self.text_encoder).items()}

    def frozen(self) -> list[str]:
        """Returns the state dict names of frozen weights and of the text encoder's buffers."""
        own = [PREFIX + name for name, weight in self.backbone.named_parameters() if not weight.requires_grad]
        text = self.text_encoder.state_dict(prefix=TEXT_PREFIX) if self.trains_text else {}
        return own + [name for name in text if name not in self.trainable_text()]

    def about(self) -> dict[str, Any]:
        """Returns the model as plain data: everything that sampling needs besides the trained weights."""
        model = {
            "schedule": self.schedule.config,
            "prediction": self.prediction.name,
            "time": self.time,
            **self.sources,
            "size": list(self.size),
            "sampling": self.sampling,
        }
        if self.adapter is None or self.base is None:
            return {"kind": self.backbone.kind, "config": self.backbone.config, "model": model}
        network = {"kind": self.backbone.kind, "config": self.backbone.config}
        base = {**self.base, "network": network}
        return {"kind": "adapter", "config": self.adapter.config, "base": base, "model": model}


def trains_text_encoder(adapter: Adapter | None, text_encoder_lr: float | None) -> bool:
    """Returns whether the text encoder is trained. Raises ValueError for an invalid learning rate."""
    inversion = isinstance(adapter, TextualInversion)
    if text_encoder_lr is not None and (inversion or not text_encoder_lr > 0):
        remedy = (
            "leave it out, because optimizer.lr is that of the new token" if inversion else "give a positive number"
        )
        raise ValueError(f"training.text_encoder_lr is {text_encoder_lr}: {remedy}")
    return inversion or text_encoder_lr is not None
