"""Builds tiny random models as other tools store them, of different widths and depths."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.nn.clip import ImageTower, TextTower
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.weights.contents import Contents, StoredNetwork, open_contents
from ldm.weights.keymaps import NATIVE
from ldm.weights.storage.values import in_memory
from tests.tiny import randomised

SCHEDULE = {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000}
SAMPLING = {"sampler": "ddim", "spacing": "leading", "steps": 3, "guidance": 5.0}
# Heads, groups and activations of Stable Diffusion, which a file without metadata is assumed to have; smaller.
SD1 = {
    "unet": {"width": 32, "multipliers": (1, 2), "blocks": 1, "depth": (1, 0)},
    "vae": {"widths": (32, 64), "blocks": 1},
    "text_tower": {"width": 64, "heads": 1, "layers": 1, "vocab_size": 60, "context": 7},
}
SD2 = {
    "unet": {
        "width": 64,
        "multipliers": (1, 1),
        "blocks": 1,
        "depth": (1, 0),
        "head_width": 64,
        "context_width": 1024,
        "linear_projection": True,
    },
    "vae": SD1["vae"],
    "text_tower": {
        "width": 64,
        "heads": 1,
        "layers": 2,
        "vocab_size": 60,
        "context": 7,
        "activation": "gelu",
        "projection": 64,
        "skip": 1,
    },
}
ODD: dict[str, dict[str, Any]] = {  # every setting differs from Stable Diffusion
    "unet": {
        "width": 8,
        "multipliers": (1, 2, 3),
        "blocks": 1,
        "depth": (0, 2, 1),
        "heads": 2,
        "context_width": 12,
        "groups": 4,
    },
    "vae": {"widths": (8, 16), "blocks": 3, "groups": 4, "scale": 0.3},
    "text_tower": {"width": 12, "layers": 2, "heads": 3, "context": 9, "vocab_size": 60},
}
ODD2 = {  # the same, with the features of Stable Diffusion 2.x
    "unet": ODD["unet"] | {"blocks": 2, "depth": (1, 0, 1), "heads": 8, "head_width": 4, "linear_projection": True},
    "vae": {"widths": (8, 8, 16), "blocks": 1, "groups": 4},
    "text_tower": ODD["text_tower"] | {"activation": "gelu", "skip": 1, "projection": 5},
}
CLASSES: dict[str, Any] = {"unet": UNet, "vae": VAE, "text_tower": TextTower, "image_tower": ImageTower}


def networks(configs: dict[str, dict[str, Any]]) -> dict[str, nn.Module]:
    return {
        kind: randomised(CLASSES[kind](**config), seed, std=0.05) for seed, (kind, config) in enumerate(configs.items())
    }


def full_model(configs: dict[str, dict[str, Any]], prediction: str = "eps", pad: int = 49407, **model: Any) -> Contents:
    """Returns a complete model in memory."""
    source = Path("memory")
    stored = {
        kind: StoredNetwork(kind, network.config, NATIVE, in_memory(source, network.state_dict()))  # type: ignore[arg-type]
        for kind, network in networks(configs).items()
    }
    settings = {"schedule": SCHEDULE, "prediction": prediction, "time": "index", "size": [16, 16], "sampling": SAMPLING}
    return Contents(source, "a model in memory", stored, settings | model, pad)


def loaded(path: Path, kind: str) -> Any:
    """Loads the network of this kind at a path, in float32."""
    return open_contents(path).network(kind).load()


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Returns every tensor in a file or below a folder, whose subfolder is then part of the name."""
    if path.is_file():
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path)["state_dict"]
    files = sorted(path.rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Returns whether both have the same names, dtypes and values."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def without_metadata(path: Path, **more: Tensor) -> Path:
    """Rewrites a file without ldm's metadata, with `more` tensors."""
    save_file(load_file(path) | more, path)
    return path
