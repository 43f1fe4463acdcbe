"""Reads and validates the metadata that ldm stores in its files beside the tensors, as plain data."""

import json
from typing import Any

from ldm.weights.kinds import ADAPTER
from ldm.weights.storage.tensors import Tensors

Types = dict[str, type | tuple[type, ...]]
ABOUT: Types = {
    **{"kind": str, "config": dict, "configs": dict, "model": dict, "pixels": dict, "pad": int, "base": dict},
    "modules": list,  # the layers that an adapter in kohya's layout changes
}
BASE: Types = {"weights": str, "fingerprint": str, "network": dict}  # the network that an adapter changes
MODEL: Types = {"schedule": dict, "prediction": str, "size": (list, tuple), "sampling": dict}  # how to sample


def about_of(tensors: Tensors) -> dict[str, Any]:
    """Returns ldm's metadata of a file, empty if it was not written by ldm. Raises ValueError if it is corrupt."""
    stored = tensors.metadata.get("ldm", {})
    try:
        about = dict(json.loads(stored) if isinstance(stored, str) else stored)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the metadata of {tensors.source} is corrupt; download or export it again") from error
    corrupt = [name for name in about.keys() & ABOUT.keys() if not isinstance(about[name], ABOUT[name])]
    if not corrupt:
        corrupt = [
            f"configs.{name}" for name, config in about.get("configs", {}).items() if not isinstance(config, dict)
        ]
        required = [("model", MODEL)] if about.get("model") else []
        required += [("base", BASE)] if about.get("kind") == ADAPTER else []
        for part, types in required:
            values = about.get(part, {})
            corrupt += [f"{part}.{name}" for name, kind in types.items() if not isinstance(values.get(name), kind)]
    if corrupt:
        names = ", ".join(sorted(corrupt))
        raise ValueError(f"the metadata of {tensors.source} is corrupt or incomplete ({names}); export it again")
    return about
