"""Defines the adapter protocol and builds adapters, which modify a pretrained denoising network, by name."""

from collections.abc import Callable
from typing import Any, Protocol

from ldm.adapters.lora import LoRA
from ldm.adapters.text import TextualInversion
from ldm.adapters.train_only import TrainOnly
from ldm.nn.backbone import Backbone
from ldm.nn.text_encoder import TextEncoder


class Adapter(Protocol):
    @property
    def config(self) -> dict[str, Any]:
        """The adapter as plain data: its name in `ADAPTERS` and its settings."""

    def adapt(self, backbone: Backbone, /) -> None:
        """Changes the network in place: adds layers and sets which weights require gradients.

        Raises ValueError if nothing in the network matches the settings.
        """

    def merge(self, backbone: Backbone, /) -> None:
        """Replaces the layers that `adapt` added to this network by plain layers with the same outputs."""

    def adapt_text(self, encoder: TextEncoder, /) -> None:
        """Changes a text encoder in place; called only if the text encoder is trained."""


ADAPTERS: dict[str, Callable[..., Adapter]] = {
    "train_only": TrainOnly,
    "lora": LoRA,
    "textual_inversion": TextualInversion,
}


def from_config(config: dict[str, Any]) -> Adapter:
    """Builds an adapter from its `config`. Raises ValueError for an unknown name or invalid settings."""
    settings = dict(config)
    name = settings.pop("name", None)
    if name not in ADAPTERS:
        raise ValueError(f"the adapter is {name!r}, but must be one of {', '.join(ADAPTERS)}")
    try:
        return ADAPTERS[name](**settings)
    except TypeError as error:
        raise ValueError(f"the adapter {name} cannot be built with {settings}: {error}") from error
