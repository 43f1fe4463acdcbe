"""Says whether Triton's kernels can run."""

import os
import shutil
import warnings
from functools import cache
from importlib.util import find_spec

import torch


@cache
def can_run(device: torch.device) -> bool:
    """Whether the device is an NVIDIA GPU of 2020 or later, and Triton and a C compiler are installed and work.

    The first call runs a kernel, because Triton needs more that may be missing: Python's headers, a folder that it can
    write to, and a driver that knows its code. Warns if that fails.
    """
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if find_spec("triton") is None or not any(map(shutil.which, compilers)):
        return False
    try:
        _run_kernel(device)
    except Exception as error:  # of many classes: of Triton, its C compiler, the file system and the driver
        warnings.warn(
            f"Triton cannot run kernels on {device}, so that PyTorch's operations replace them, which are slower "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}): install Python's headers and set "
            "TRITON_CACHE_DIR to a folder that can be written to",
            stacklevel=2,
        )
        return False
    return True


def _run_kernel(device: torch.device) -> None:
    from ldm.kernels.noise import numbers

    ids = torch.zeros(1, dtype=torch.int64, device=device)
    numbers("uniform", (0, 1), ids, ids, 4)
