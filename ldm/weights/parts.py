"""The frozen parts of a latent diffusion model, each with a record of where its weights came from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.image import from_uint8
from ldm.nn.clip import CLIP, ImageTower, TextTower
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.vae import VAE
from ldm.weights.contents import Contents
from ldm.weights.find import find
from ldm.weights.native import fingerprint


@dataclass(frozen=True)
class FirstStage:
    network: VAE
    source: dict[str, Any]  # {"weights", "fingerprint"}


@dataclass(frozen=True)
class TextEncoder:
    network: TextTower
    tokenizer: Tokenizer
    source: dict[str, Any]


def first_stage(weights: str) -> FirstStage:
    """The autoencoder at a path, see `find`: alone, or in a whole model. Raises FileNotFoundError or ValueError."""
    return first_stage_in(find(weights), weights)


def first_stage_in(contents: Contents, weights: str = "") -> FirstStage:
    network = cast(VAE, contents.network("vae").load())
    return FirstStage(network, _source(network, weights or str(contents.source)))


def encoder(first_stage: FirstStage) -> Callable[[Tensor], Tensor]:
    """uint8 pictures (b, 3, h, w) → moments (b, 2z, h/f, w/f) on the CPU, computed on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = first_stage.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def encode(pictures: Tensor) -> Tensor:
        return network.moments(from_uint8(pictures.to(device))).cpu()

    return encode


def text_encoder(weights: str) -> TextEncoder:
    """The text tower at a path, see `find`, with a tokenizer as long as its context, padded as the path's does."""
    return text_encoder_in(find(weights), weights)


def text_encoder_in(contents: Contents, weights: str = "") -> TextEncoder:
    network = cast(TextTower, contents.network("text_tower").load())
    return TextEncoder(
        network, Tokenizer(context=network.context, pad=contents.pad), _source(network, weights or str(contents.source))
    )


def image_tower(weights: str) -> ImageTower:
    """CLIP's image tower at a path, see `find`, alone or beside its text tower."""
    contents = find(weights)
    if "clip" in contents.networks:
        return cast(CLIP, contents.network("clip").load()).image
    return cast(ImageTower, contents.network("image_tower").load())


def _source(network: nn.Module, weights: str) -> dict[str, Any]:
    return {"weights": weights, "fingerprint": fingerprint(network.state_dict())}
