"""Writing one file of weights: a whole model in the layout of CompVis, or a part alone."""

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

WHOLE, PART = "stable_diffusion", "part"  # the "kind" in the metadata of what we wrote


def whole(contents: Contents) -> tuple[dict[tuple[str, str], Tensors], dict[str, Any]]:
    """The networks arranged for one file, and the plain data that their tensors do not tell."""
    arranged = {(kind, layout): contents.networks[kind].arranged(layout) for kind, layout in layouts(contents.networks)}
    about = {
        "configs": {kind: network.full_config for kind, network in contents.networks.items()},
        "pad": contents.pad,
        "pixels": asdict(contents.pixels),
    }
    return arranged, about | ({"model": contents.model} if contents.model else {})


def write_file(path: Path, contents: Contents) -> None:
    """Write a whole model, or one part alone, as .safetensors or .ckpt."""
    arranged, about = whole(contents)
    is_whole = {"unet", "vae", "text_tower"} <= contents.networks.keys()
    about |= {"kind": WHOLE if is_whole else PART}
    prefixed: dict[str, tuple[Tensors, str]] = {}
    for place, tensors in arranged.items():
        prefix = PREFIXES[place] if is_whole else ""
        prefixed |= {prefix + name: (tensors, name) for name in tensors}

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        found: dict[str, Tensor] = {}
        for tensors in arranged.values():
            own = {name: prefixed[name][1] for name in names if prefixed[name][0] is tensors}
            values = tensors.read(own.values())
            found |= {name: values[inner] for name, inner in own.items()}
        return found

    headers = {name: tensors[inner] for name, (tensors, inner) in prefixed.items()}
    if path.suffix in PICKLED:
        state = {name: tensor.clone() for name, tensor in read(headers).items()}  # a view would bring its whole storage
        _save(path, {"state_dict": state, "ldm": about})
    else:
        write_safetensors(
            path, Tensors(contents.source, headers, read), {"format": "pt", "ldm": json.dumps(about)} | _spec(contents)
        )


def layouts(networks: Mapping[str, StoredNetwork]) -> list[tuple[str, str]]:
    """In which layout each network lies in a single file: OpenCLIP's for towers with plain GELU, as SD 2.x's."""
    text = networks.get("text_tower")
    openclip = text is not None and text.config["activation"] == "gelu"
    of = {"text_tower": "openclip" if openclip else "transformers", "image_tower": "transformers"}
    return [(kind, of.get(kind, "compvis")) for kind in networks]


def _save(path: Path, checkpoint: dict[str, Any]) -> None:
    try:
        atomic_write(path, lambda file: torch.save(checkpoint, file))
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # such as a full disk's, which torch.save hides behind its own
            raise write_error(error.__context__, path) from error
        raise


def _spec(contents: Contents) -> dict[str, str]:
    """What other tools read to tell v from eps."""
    prediction = {"eps": "epsilon", "v": "v"}.get(contents.model.get("prediction", ""))
    return {"modelspec.prediction_type": prediction} if prediction else {}
