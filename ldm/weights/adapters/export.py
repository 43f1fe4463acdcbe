"""Prepares a trained adapter for export, in kohya's layout and with metadata about its training."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ldm.adapters.low_rank import LowRank
from ldm.nn.clip import TextTower
from ldm.weights.adapters.own import PARTS, kohya_names, text_names

VERSIONS = {768: "sd_v1", 1024: "sd_v2"}  # of Stable Diffusion, by the width of the UNet's text context
ARCHITECTURES = {"sd_v1": "stable-diffusion-v1/lora", "sd_v2": "stable-diffusion-v2/lora"}


def exported(
    state: dict[str, Tensor],
    layers: dict[str, LowRank],
    about: dict[str, Any],
    facts: dict[str, str],
    towers: Mapping[TextTower, Mapping[str, LowRank]] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Returns the tensors of adapted layers in kohya's layout, the plain data of ldm, and metadata for other tools."""
    labels = kohya_names(about["base"]["network"], list(layers))
    renamed = _named(labels, layers, state)
    for tower, adapted in towers.items():
        renamed |= _named(text_names(tower.config, list(adapted)), adapted, tower.state_dict())
    return renamed, {**about, "modules": list(layers)}, {**_metadata(about), **facts}


def _named(labels: dict[str, str], layers: Mapping[str, LowRank], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of adapted layers by their names in kohya's layout."""
    tensors = {
        f"{label}.{ending}": state[f"{own}.{part}"]
        for own, label in labels.items()
        for part, ending in PARTS.items()
        if f"{own}.{part}" in state
    }
    return tensors | {f"{label}.alpha": torch.tensor(layers[own].alpha) for own, label in labels.items()}


def _metadata(about: dict[str, Any]) -> dict[str, str]:
    """Returns metadata with the keys of kohya's trainer (ss_) and of Stability AI's model specification (modelspec)."""
    base, model, settings = about["base"], about["model"], about["config"]
    network, (height, width) = base["network"], model["size"]
    found = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings["rank"]),
        "ss_network_alpha": str(settings["rank"] if settings["alpha"] is None else settings["alpha"]),
        "ss_network_dropout": str(settings["dropout"]),
        "ss_sd_model_name": Path(base["weights"]).name,
        "ss_sd_model_hash": base["fingerprint"],
        "ss_resolution": f"({width}, {height})",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"LoRA of {Path(base['weights']).name}",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": {"eps": "epsilon"}.get(model["prediction"], model["prediction"]),
    }
    version = VERSIONS.get(network["config"].get("context_width")) if network["kind"] == "unet" else None
    if version is not None:
        found |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
        found |= {"modelspec.architecture": ARCHITECTURES[version]}
    if "licence" in base:
        found["modelspec.license"] = base["licence"]
    return found
