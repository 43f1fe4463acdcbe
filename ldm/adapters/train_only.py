"""Implements an adapter that trains some of the network's weights and freezes the others."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from ldm.adapters.text import train_all
from ldm.nn.backbone import Backbone
from ldm.nn.text_encoder import TextEncoder


class TrainOnly:
    """Trains only the weights whose names match one of the patterns, such as "*.text_attention.*"."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    @property
    def config(self) -> dict[str, Any]:
        return {"name": "train_only", "names": self.names}

    def adapt(self, backbone: Backbone) -> None:
        trainable = 0
        for name, weight in backbone.named_parameters():
            weight.requires_grad_(any(fnmatchcase(name, pattern) for pattern in self.names))
            trainable += weight.requires_grad
        if not trainable:
            prefixes = ", ".join(dict.fromkeys(name.partition(".")[0] for name, _ in backbone.named_parameters()))
            raise ValueError(
                f"adapter.names={self.names} matches no weight of this {backbone.kind}: its names begin with {prefixes}"
            )

    def merge(self, backbone: Backbone) -> None:
        """Does nothing, because no layers were added."""

    def adapt_text(self, encoder: TextEncoder) -> None:
        """Trains all weights of the text encoder that are in use."""
        train_all(encoder)
