"""The kinds of networks that files may hold: a closed list, which naming one does not import."""

from importlib import import_module
from typing import Any

# What a denoising network is called in files, and its class, a `Backbone`.
BACKBONES = {
    "unet": "ldm.nn.unet.UNet",
    "dit": "ldm.nn.dit.DiT",
}
ADAPTER = "adapter"  # a change to a denoising network of another file, which it names
FOR_OTHERS = ("lora", "embedding")  # files that we write as other tools do, and that name no base
KINDS = BACKBONES | {
    "vae": "ldm.nn.vae.VAE",
    "text_tower": "ldm.nn.clip.TextTower",
    "image_tower": "ldm.nn.clip.ImageTower",
    "clip": "ldm.nn.clip.clip_from",
}


def constructor(kind: str) -> Any:
    """What makes a network of this kind from its config. Raises LookupError for an unknown kind."""
    module, _, name = KINDS[kind].rpartition(".")
    return getattr(import_module(module), name)
