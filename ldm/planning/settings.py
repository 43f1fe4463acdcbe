"""The precision, strategy and number of GPUs that a resolved config asks for."""

from typing import Any

import torch

from ldm.planning.config_tree import targets

ONE_DTYPE = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def is_sharded(trainer: dict[str, Any]) -> bool:
    return any("ModelParallel" in target for target in targets(trainer["strategy"]))


def compute(config: dict[str, Any]) -> torch.dtype:
    """What the trained network's weights are when it is called."""
    named = config["training"].get("compute")
    return getattr(torch, named) if named else ONE_DTYPE.get(config["trainer"]["precision"], torch.float32)


def precision_of(config: dict[str, Any]) -> str:
    named = config["training"].get("compute")
    return f"{named} from float32 weights" if named else config["trainer"]["precision"]


def count_gpus(trainer: dict[str, Any]) -> int:
    """How many GPUs the Trainer's arguments ask for; as many as it finds (auto) counts as one a node."""
    devices = trainer["devices"]
    if isinstance(devices, list):
        return len(devices) * trainer["num_nodes"]
    return (1 if devices in ("auto", "-1", -1) else int(devices)) * trainer["num_nodes"]
