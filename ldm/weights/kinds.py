"""Lists the kinds of networks that files may contain, a closed list; classes are imported on demand."""

from importlib import import_module
from typing import Any

# The name of each denoising network in files, and its class, a `Backbone`.
BACKBONES = {
    "unet": "ldm.nn.unet.UNet",
    "dit": "ldm.nn.dit.DiT",
}
ADAPTER = "adapter"  # a change to the denoising network in another file, which the adapter's file names
FOR_OTHERS = ("lora", "embedding")  # files in the layouts of other tools, which name no base
KINDS = BACKBONES | {
    "vae": "ldm.nn.vae.VAE",
    "text_tower": "ldm.nn.clip.TextTower",
    "image_tower": "ldm.nn.clip.ImageTower",
    "clip": "ldm.nn.clip.clip_from_configs",
}


def constructor(kind: str) -> Any:
    """Returns the callable that builds a network of this kind from its config. Raises LookupError if it is unknown."""
    module, _, name = KINDS[kind].rpartition(".")
    return getattr(import_module(module), name)
