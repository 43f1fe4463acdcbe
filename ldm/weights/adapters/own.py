"""The file of an adapter that a run of ours trained: kohya's layout, so that other tools read it, and our plain data.

Our data lists the adapted layers as "modules", by which the tensors get the names back that they have in the network.
"""

from collections.abc import Sequence
from typing import Any

from ldm.weights.adapters.names import TEXT, aliased, public_names, underscored
from ldm.weights.storage.tensors import Tensors

PARTS = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}

TEXT_PREFIX = "lora_te_"


def kohya_names(network: dict[str, Any], layers: Sequence[str]) -> dict[str, str]:
    """The label in a file of each layer of a network, given as its "kind" and "config"."""
    public = public_names(network["kind"], network["config"], layers)
    return {own: f"lora_unet_{underscored(public[own])}" for own in layers}


def text_names(config: dict[str, Any], layers: Sequence[str]) -> dict[str, str]:
    """Returns the label in a file of each layer of the text tower with this config."""
    public = public_names("text_tower", config, layers)
    return {own: f"{TEXT_PREFIX}{underscored(aliased(TEXT, public[own]))}" for own in layers}


def as_in_network(tensors: Tensors, about: dict[str, Any]) -> Tensors:
    """The trained tensors under their names in the network, if the file has those of kohya."""
    if "modules" not in about:
        return tensors
    labels = kohya_names(about["base"]["network"], about["modules"])
    names = {f"{own}.{part}": f"{label}.{ending}" for own, label in labels.items() for part, ending in PARTS.items()}
    alphas = {f"{label}.alpha" for label in labels.values()}
    known = {own: theirs for own, theirs in names.items() if theirs in tensors}
    text = {name for name in tensors if name.startswith(TEXT_PREFIX)}  # merged into the text encoder instead
    strays = tensors.keys() - {*known.values()} - alphas - text
    return tensors.renamed(known | {name: name for name in strays})
