"""Builds a complete model of tiny random networks, and saves it in ldm's own format."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.nn.clip import TextTower
from ldm.nn.dit import DiT
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.weights.model import save_model
from ldm.weights.native import fingerprint, save_network

KNOWN = "a red circle blue square on white background"
SAMPLING = {"sampler": "dpmpp_2m", "spacing": "trailing", "steps": 3, "guidance": 2.0}


def randomised(network: nn.Module, seed: int, std: float) -> nn.Module:
    """Samples every parameter from N(0, std²), so that none is zero; a low `std` keeps images from saturating."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return network.eval()


def tiny_unet(seed: int = 0) -> UNet:
    return randomised(  # type: ignore[return-value]
        UNet(width=8, multipliers=(1, 2), blocks=1, depth=(0, 1), heads=2, context_width=16, groups=4),
        seed,
        std=0.3,
    )


def tiny_inpainting_unet(seed: int = 3, channels: int = 9) -> UNet:
    return randomised(UNet(**tiny_unet().config | {"in_channels": channels}), seed, std=0.3)  # type: ignore[return-value]


def tiny_vae(seed: int = 1) -> VAE:
    return randomised(VAE(widths=(8, 8), blocks=1, groups=4), seed, std=0.2)  # type: ignore[return-value]


def tiny_text_tower(seed: int = 2) -> TextTower:
    tokens = sorted(set(Tokenizer()([KNOWN]).flatten().tolist()))
    tower = TextTower(width=16, layers=1, heads=2, context=16, token_ids=tokens)
    return randomised(tower, seed, std=1.5)  # type: ignore[return-value]


def tiny_text_encoder() -> TextEncoder:
    return TextEncoder([tiny_text_tower()], [Tokenizer(context=16)])


def tiny_dit(seed: int = 3) -> DiT:
    return randomised(DiT(width=16, layers=2, heads=2, context_width=16), seed, std=0.3)  # type: ignore[return-value]


def save_part(path: Path, kind: str, network: Any) -> dict[str, str]:
    save_network(path, kind, network.config, network.state_dict())
    return {"weights": str(path), "fingerprint": fingerprint(network.state_dict())}


def tiny_about(folder: Path) -> dict[str, Any]:
    """Returns the metadata of a tiny model, after saving its frozen parts in `folder`."""
    return {
        "kind": "unet",
        "config": tiny_unet().config,
        "model": {
            "schedule": {"name": "flow", "shift": 1.0},
            "prediction": "flow",
            "time": None,
            "first_stage": save_part(folder / "vae.safetensors", "vae", tiny_vae()),
            "text_encoder": save_part(folder / "text_tower.safetensors", "text_tower", tiny_text_tower()),
            "size": [16, 16],
            "sampling": dict(SAMPLING),
        },
    }


def save_tiny_model(folder: Path) -> Path:
    """Saves a tiny model in ldm's own format and returns the path of its file."""
    path = folder / "unet.safetensors"
    save_model(path, tiny_unet().state_dict(), tiny_about(folder))
    return path
