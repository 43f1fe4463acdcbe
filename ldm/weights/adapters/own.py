"""Names the tensors of adapters trained by ldm, which are stored in kohya's layout so that other tools read them.

The plain data of ldm in the file lists the adapted layers as "modules", from which the names in the network are
restored.
"""

from collections.abc import Sequence
from typing import Any

from ldm.weights.adapters.names import TEXT, aliased, public_names, underscored
from ldm.weights.storage.tensors import Tensors

PARTS = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}

TEXT_PREFIX = "lora_te_"


def kohya_names(network: dict[str, Any], layers: Sequence[str]) -> dict[str, str]:
    """Returns the label in a file of each layer of the network with this "kind" and "config"."""
    public = public_names(network["kind"], network["config"], layers)
    return {own: f"lora_unet_{underscored(public[own])}" for own in layers}


def text_names(config: dict[str, Any], layers: Sequence[str]) -> dict[str, str]:
    """Returns the label in a file of each layer of the text tower with this config."""
    public = public_names("text_tower", config, layers)
    return {own: f"{TEXT_PREFIX}{underscored(aliased(TEXT, public[own]))}" for own in layers}


def as_in_network(tensors: Tensors, about: dict[str, Any]) -> Tensors:
    """Renames trained tensors from kohya's names to those in the network; other tensors are unchanged."""
    if "modules" not in about:
        return tensors
    labels = kohya_names(about["base"]["network"], about["modules"])
    names = {f"{own}.{part}": f"{label}.{ending}" for own, label in labels.items() for part, ending in PARTS.items()}
    alphas = {f"{label}.alpha" for label in labels.values()}
    known = {own: theirs for own, theirs in names.items() if theirs in tensors}
    text = {name for name in tensors if name.startswith(TEXT_PREFIX)}  # these are merged into the text encoder
    strays = tensors.keys() - {*known.values()} - alphas - text
    return tensors.renamed(known | {name: name for name in strays})
