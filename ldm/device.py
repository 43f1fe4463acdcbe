"""The device that computes, what it has instructions for, and the precision that suits it."""

import re

import torch

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
AUTO = "auto"


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device is {name!r}, but must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name} here ({torch.cuda.device_count()} GPUs): use device=cpu")
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is fast there; elsewhere it is emulated, at a fraction of float32's speed."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def has_amx() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 as such (AMX)."""
    return torch.cpu.get_capabilities().get("amx_bf16", False)


def choose_precision(name: str, device: str) -> str:
    """ "auto" is the fastest that draws nearly what float32 does. Raises ValueError for a device that is not there."""
    if name != AUTO:
        return name
    return "bf16" if has_bf16(choose_device(device)) else "32"
