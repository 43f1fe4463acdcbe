"""The frozen parts of a latent diffusion model, each with a record of where its weights came from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ldm.image import from_uint8
from ldm.nn.clip import TextTower
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.vae import VAE
from ldm.weights.native import fingerprint, load_network


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
    """The autoencoder in a file of ours. Raises FileNotFoundError, or ValueError if it holds something else."""
    network = cast(VAE, load_network(weights, "vae"))
    return FirstStage(network, {"weights": weights, "fingerprint": fingerprint(network.state_dict())})


def encoder(first_stage: FirstStage) -> Callable[[Tensor], Tensor]:
    """uint8 pictures (b, 3, h, w) → moments (b, 2z, h/f, w/f) on the CPU, computed on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = first_stage.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def encode(pictures: Tensor) -> Tensor:
        return network.moments(from_uint8(pictures.to(device))).cpu()

    return encode


def text_encoder(weights: str) -> TextEncoder:
    """The text tower in a file of ours, with a tokenizer as long as its context."""
    network = cast(TextTower, load_network(weights, "text_tower"))
    source = {"weights": weights, "fingerprint": fingerprint(network.state_dict())}
    return TextEncoder(network, Tokenizer(context=network.context), source)
