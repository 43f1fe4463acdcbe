"""Says whether Triton's kernels can run."""

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch


@cache
def can_run(device: torch.device) -> bool:
    """Whether the device is an NVIDIA GPU of 2020 or later, and Triton and a C compiler are installed."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return find_spec("triton") is not None and any(map(shutil.which, compilers))
