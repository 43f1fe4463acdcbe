"""Describes the networks at a path, and how to sample from them, without reading a tensor or importing torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.weights.kinds import BACKBONES
from ldm.weights.storage.tensors import Tensors

PAD = 49407  # the padding token of CLIP and Stable Diffusion 1.x; 2.x uses 0


@dataclass(frozen=True)
class PixelStats:
    """The mean and standard deviation of each channel, with which images in [0, 1] are normalised."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


OPENAI = PixelStats((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # and OpenCLIP's


@dataclass(frozen=True)
class NetworkInfo:
    """A network on disk: its architecture, and the headers of its tensors, named as in a layout of `keymaps`."""

    kind: str
    config: dict[str, Any]
    layout: str
    tensors: Tensors


@dataclass(frozen=True)
class ContentsInfo:
    """The networks at `source` by kind; `model` says how to sample from them, if that is known."""

    source: Path
    description: str  # human-readable
    networks: Mapping[str, NetworkInfo]
    model: dict[str, Any] = field(default_factory=dict)  # {"schedule", "prediction", "time", "size", "sampling"}
    pad: int = PAD  # the token with which captions are padded
    pixels: PixelStats = OPENAI  # the normalisation of an image tower's input
    notes: tuple[str, ...] = ()  # human-readable notes on what was chosen or guessed
    guesses: tuple[str, ...] = ()  # those of the notes that may be wrong, with the remedy
    base: dict[str, Any] = field(default_factory=dict)  # of an adapter: {"weights", "fingerprint", "network"}

    @property
    def backbone(self) -> str | None:
        """The kind of the denoising network, or None."""
        return next((kind for kind in self.networks if kind in BACKBONES), None)


def standalone(networks: Iterable[str]) -> str:
    """Returns the description of networks that are not part of a complete model."""
    return f"a standalone {' and '.join(networks)}"
