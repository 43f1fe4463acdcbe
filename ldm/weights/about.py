"""What a file of ours says of itself besides its tensors: plain data."""

import json
from typing import Any

from ldm.weights.kinds import ADAPTER
from ldm.weights.storage.tensors import Tensors

Types = dict[str, type | tuple[type, ...]]
ABOUT: Types = {
    **{"kind": str, "config": dict, "configs": dict, "model": dict, "pixels": dict, "pad": int, "base": dict},
    "modules": list,  # the layers that an adapter in kohya's layout changes
}
BASE: Types = {"weights": str, "fingerprint": str, "network": dict}  # what an adapter changes
MODEL: Types = {"schedule": dict, "prediction": str, "size": (list, tuple), "sampling": dict}  # how to sample


def about_of(tensors: Tensors) -> dict[str, Any]:
    """Nothing for files of others. Raises ValueError where it is damaged."""
    told = tensors.metadata.get("ldm", {})
    try:
        about = dict(json.loads(told) if isinstance(told, str) else told)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the metadata of {tensors.source} is damaged; fetch or export it again") from error
    damaged = [name for name in about.keys() & ABOUT.keys() if not isinstance(about[name], ABOUT[name])]
    if not damaged:
        damaged = [
            f"configs.{name}" for name, config in about.get("configs", {}).items() if not isinstance(config, dict)
        ]
        required = [("model", MODEL)] if about.get("model") else []
        required += [("base", BASE)] if about.get("kind") == ADAPTER else []
        for part, types in required:
            values = about.get(part, {})
            damaged += [f"{part}.{name}" for name, kind in types.items() if not isinstance(values.get(name), kind)]
    if damaged:
        names = ", ".join(sorted(damaged))
        raise ValueError(f"the metadata of {tensors.source} is damaged or incomplete ({names}); export it again")
    return about
