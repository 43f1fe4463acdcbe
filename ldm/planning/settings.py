"""Reads the precision, strategy and number of GPUs from a resolved config."""

from typing import Any

import torch

from ldm.planning.config_tree import targets

ONE_DTYPE = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def is_sharded(trainer: dict[str, Any]) -> bool:
    return any("ModelParallel" in target for target in targets(trainer["strategy"]))


def compute_dtype(config: dict[str, Any]) -> torch.dtype:
    """Returns the dtype of the trained network's weights in the forward pass."""
    name = config["training"].get("compute")
    return getattr(torch, name) if name else ONE_DTYPE.get(config["trainer"]["precision"], torch.float32)


def precision_of(config: dict[str, Any]) -> str:
    name = config["training"].get("compute")
    return f"{name} from float32 weights" if name else config["trainer"]["precision"]


def kind_of_product(config: dict[str, Any]) -> str:
    """Returns the type in which GPUs multiply: bf16 (or float16, which is as fast), TF32 or float32."""
    if not precision_of(config).startswith("32"):
        return "bf16"
    return "TF32" if config.get("precision", {}).get("tf32") else "float32"


def count_gpus(trainer: dict[str, Any]) -> int:
    """Returns the number of GPUs in the Trainer's arguments; devices=auto or -1 counts as one per node."""
    devices = trainer["devices"]
    if isinstance(devices, list):
        return len(devices) * trainer["num_nodes"]
    return (1 if devices in ("auto", "-1", -1) else int(devices)) * trainer["num_nodes"]
