"""Writes single files: a complete model in CompVis's layout, or standalone networks."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.files import atomic_write, write_error
from ldm.weights.compvis.reader import PREFIXES
from ldm.weights.contents import Contents, StoredNetwork
from ldm.weights.storage.tensors import PICKLED, Tensors
from ldm.weights.storage.values import write_safetensors

COMPLETE, PART = "stable_diffusion", "part"  # the "kind" in the metadata of files written by ldm


def in_layouts(contents: Contents) -> tuple[dict[tuple[str, str], Tensors], dict[str, Any]]:
    """Returns the networks in the layouts of a single file, and the metadata that their tensors do not determine."""
    networks = {
        (kind, layout): contents.networks[kind].in_layout(layout) for kind, layout in layouts(contents.networks)
    }
    about = {
        "configs": {kind: network.full_config for kind, network in contents.networks.items()},
        "pad": contents.pad,
        "pixels": asdict(contents.pixels),
    }
    return networks, about | ({"model": contents.model} if contents.model else {})


def write_file(path: Path, contents: Contents) -> None:
    """Writes a complete model, or standalone networks, as .safetensors or .ckpt."""
    networks, about = in_layouts(contents)
    is_complete = {"unet", "vae", "text_tower"} <= contents.networks.keys()
    about |= {"kind": COMPLETE if is_complete else PART}
    prefixed: dict[str, tuple[Tensors, str]] = {}
    for kind_and_layout, tensors in networks.items():
        prefix = PREFIXES[kind_and_layout] if is_complete else ""
        prefixed |= {prefix + name: (tensors, name) for name in tensors}

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        values: dict[str, Tensor] = {}
        for tensors in networks.values():
            own = {name: prefixed[name][1] for name in names if prefixed[name][0] is tensors}
            stored = tensors.read(own.values())
            values |= {name: stored[inner] for name, inner in own.items()}
        return values

    headers = {name: tensors[inner] for name, (tensors, inner) in prefixed.items()}
    if path.suffix in PICKLED:
        state = {name: tensor.clone() for name, tensor in read(headers).items()}  # views would save all their storage
        _save(path, {"state_dict": state, "ldm": about})
    else:
        write_safetensors(
            path, Tensors(contents.source, headers, read), {"format": "pt", "ldm": json.dumps(about)} | _spec(contents)
        )


def layouts(networks: Mapping[str, StoredNetwork]) -> list[tuple[str, str]]:
    """Returns the layout of each network in a single file: OpenCLIP's for text towers with GELU, as in SD 2.x."""
    text = networks.get("text_tower")
    openclip = text is not None and text.config["activation"] == "gelu"
    towers = {"text_tower": "openclip" if openclip else "transformers", "image_tower": "transformers"}
    return [(kind, towers.get(kind, "compvis")) for kind in networks]


def _save(path: Path, checkpoint: dict[str, Any]) -> None:
    try:
        atomic_write(path, lambda file: torch.save(checkpoint, file))
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # such as that of a full disk, which torch.save hides
            raise write_error(error.__context__, path) from error
        raise


def _spec(contents: Contents) -> dict[str, str]:
    """Returns the metadata from which other tools read whether the network predicts v or eps."""
    prediction = {"eps": "epsilon", "v": "v"}.get(contents.model.get("prediction", ""))
    return {"modelspec.prediction_type": prediction} if prediction else {}
