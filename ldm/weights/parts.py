"""Loads the frozen parts of a latent diffusion model, each with a record of the source of its weights."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from ldm.image import from_uint8
from ldm.nn.clip import CLIP, ImageTower, TextTower
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.vae import VAE
from ldm.weights.contents import Contents, open_contents
from ldm.weights.info import PixelStats
from ldm.weights.kinds import constructor
from ldm.weights.native import fingerprint

UNTRAINED = "untrained"  # given in place of a path, for random weights

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Frozen(Generic[Network]):
    """A network that is not trained, and its source: the path of its "weights", and their "fingerprint"."""

    network: Network
    source: dict[str, Any]


@dataclass(frozen=True)
class ImageEncoder:
    """CLIP's image tower, and the normalisation of its input."""

    network: ImageTower
    pixels: PixelStats


def first_stage(weights: str, config: dict[str, Any] | None = None) -> Frozen[VAE]:
    """Loads the autoencoder at a path that `recognise` reads, standalone or in a complete model.

    "untrained" returns one with this `config` and random weights, to rehearse a run. Raises FileNotFoundError or
    ValueError.
    """
    if weights == UNTRAINED:
        network = cast(VAE, untrained("first_stage", "vae", config))
        return Frozen(network, _source(network, weights))
    return first_stage_in(open_contents(weights), weights)


def first_stage_in(contents: Contents, weights: str = "") -> Frozen[VAE]:
    """Loads the autoencoder of opened contents; `weights` is the path to record, by default theirs."""
    network = cast(VAE, contents.network("vae").load())
    return Frozen(network, _source(network, weights or str(contents.source)))


class Encoder:
    """Maps uint8 images (b, 3, h, w) to moments (b, 2z, h/f, w/f) on the CPU. It runs on a GPU if there is one.

    `identity` determines the moments of an image, up to rounding.
    """

    def __init__(self, first_stage: Frozen[VAE]) -> None:
        self.first_stage = first_stage
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def identity(self) -> dict[str, Any]:
        device = "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        return {"first_stage": self.first_stage.source["fingerprint"], "device": device}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        network = self.first_stage.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network.moments(from_uint8(images.to(self.device))).cpu()


def encoder(first_stage: Frozen[VAE]) -> Encoder:
    """Returns the encoder of a first stage, under the name that configs of earlier runs have."""
    return Encoder(first_stage)


def caption_encoder(text_encoder: Frozen[TextEncoder], lr: float | None = None) -> Callable[[list[str]], Tensor] | None:
    """Returns a function from captions to text states (b, n, d) on the CPU. It runs on a GPU if there is one.

    Returns None for a text encoder that is trained, at a learning rate `lr`, because its states change.
    """
    if lr is not None:
        return None

    @torch.inference_mode()
    def encode(captions: list[str]) -> Tensor:
        # Not before the first call, when a distributed run has assigned each rank its own GPU.
        network = text_encoder.network.to("cuda" if torch.cuda.is_available() else "cpu")
        return network.encode(captions).get("text").cpu()

    return encode


def text_encoder(weights: str, config: dict[str, Any] | None = None) -> Frozen[TextEncoder]:
    """Loads the text tower at a path that `recognise` reads, with a tokenizer of the same context and padding.

    "untrained" returns one with this `config` and random weights, to rehearse a run.
    """
    if weights == UNTRAINED:
        tower = cast(TextTower, untrained("text_encoder", "text_tower", config))
        return Frozen(TextEncoder([tower], [Tokenizer(context=tower.context)]), _source(tower, weights))
    return text_encoder_in(open_contents(weights), weights)


def text_encoder_in(contents: Contents, weights: str = "") -> Frozen[TextEncoder]:
    """Loads the text tower of opened contents; `weights` is the path to record, by default theirs."""
    tower = cast(TextTower, _tower(contents, "text_tower"))
    tokenizer = Tokenizer(context=tower.context, pad=contents.pad)
    return Frozen(TextEncoder([tower], [tokenizer]), _source(tower, weights or str(contents.source)))


def image_encoder(weights: str) -> ImageEncoder:
    """Loads CLIP's image tower at a path that `recognise` reads, standalone or with its text tower."""
    contents = open_contents(weights)
    return ImageEncoder(cast(ImageTower, _tower(contents, "image_tower")), contents.pixels)


def _tower(contents: Contents, kind: str) -> nn.Module:
    if "clip" not in contents.networks:
        return contents.network(kind).load()
    clip = cast(CLIP, contents.network("clip").load())
    return clip.text if kind == "text_tower" else clip.image


def untrained(part: str, kind: str, config: dict[str, Any] | None) -> nn.Module:
    """Builds a network with random weights, which are the same each time. Warns about it."""
    warnings.warn(f"{part}.weights=untrained: its weights are random, which only suits a rehearsal", stacklevel=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = constructor(kind)(**(config or {}))
        return network.eval()


def _source(network: nn.Module, weights: str) -> dict[str, Any]:
    return {"weights": weights, "fingerprint": fingerprint(network.state_dict())}
