"""Training a part of a network's weights, and leaving the others as they are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from ldm.nn.backbone import Backbone


class TrainOnly:
    """Trains the weights whose names match one of the patterns, such as "*.text_attention.*"."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    @property
    def config(self) -> dict[str, Any]:
        return {"name": "train_only", "names": self.names}

    def adapt(self, backbone: Backbone) -> None:
        chosen = 0
        for name, weight in backbone.named_parameters():
            weight.requires_grad_(any(fnmatchcase(name, pattern) for pattern in self.names))
            chosen += weight.requires_grad
        if not chosen:
            known = ", ".join(dict.fromkeys(name.partition(".")[0] for name, _ in backbone.named_parameters()))
            raise ValueError(
                f"adapter.names={self.names} matches no weight of this {backbone.kind}, whose names begin with {known}"
            )

    def merge(self, backbone: Backbone) -> None:
        """Nothing to do: it adds no layers."""
