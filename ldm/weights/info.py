"""What is found at a path: networks, by their tensors' names, and how to sample with them. No tensor is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.weights.kinds import BACKBONES
from ldm.weights.storage.tensors import Tensors

PAD = 49407  # of CLIP and Stable Diffusion 1.x; 2.x has 0


@dataclass(frozen=True)
class Pixels:
    """What a network wants pictures of [0, 1] brought to mean 0 and deviation 1 from, by channel."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


OPENAI = Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # and OpenCLIP's


@dataclass(frozen=True)
class NetworkInfo:
    """One network on disk: its architecture, and its tensors under the names of a layout of `keymaps`."""

    kind: str
    config: dict[str, Any]
    layout: str
    tensors: Tensors


@dataclass(frozen=True)
class ContentsInfo:
    """The networks at `source` by their kind; `model` says how to sample, where that is known."""

    source: Path
    form: str  # for people
    networks: Mapping[str, NetworkInfo]
    model: dict[str, Any] = field(default_factory=dict)  # {"schedule", "prediction", "time", "size", "sampling"}
    pad: int = PAD  # the token that fills captions up
    pixels: Pixels = OPENAI  # what an image tower reads
    notes: tuple[str, ...] = ()  # what was chosen or guessed, for people
    base: dict[str, Any] = field(default_factory=dict)  # of an adapter: {"weights", "fingerprint", "network"}

    @property
    def backbone(self) -> str | None:
        """The kind of the denoising network, if one is there."""
        return next((kind for kind in self.networks if kind in BACKBONES), None)
