"""Selects the device of a process, and reports which bfloat16 instructions it has."""

import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.errors import UsageError

ATTENTION = {  # kernels of GPUs, in torch's own order
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
NO_MPS = "Apple's MPS has no float64, in which ldm computes schedules"


def choose_device(name: str) -> torch.device:
    """Returns the named device; "auto" is the GPU if there is one. Raises UsageError for an unavailable one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] == "mps":
        raise UsageError(f"device={name} is not supported, because {NO_MPS}: use device=cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"device is {name!r}, but must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no device {name} ({torch.cuda.device_count()} GPUs are available): use device=cpu")
    return device


def device_of_rank(name: str, local_rank: int) -> str:
    """Returns the device of one of the processes on this machine, each of which gets its own GPU for "auto" or "cuda".

    The GPU also becomes what "cuda" without a number means in this process.
    """
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    index = local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def ranks() -> tuple[int, int, int]:
    """Returns rank, number of ranks and local rank from the variables of torchrun or of a step of srun, else (0, 1, 0).

    A SLURM job is not a step: it has variables with the same numbers, but its script runs once, as does the shell that
    srun --pty starts. Raises ValueError for a rank that is not below the number of ranks.
    """
    torchrun = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    srun = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
    shell = "SLURM_PTY_PORT" in os.environ and sys.stdin is not None and sys.stdin.isatty()
    for names in (torchrun,) if shell else (torchrun, srun):
        if names[0] in os.environ and names[1] in os.environ:
            rank, world, local = (int(os.environ.get(name, 0)) for name in names)
            if not 0 <= rank < world:
                raise ValueError(f"{names[0]}={rank} and {names[1]}={world}: expected a rank below the number of ranks")
            return rank, world, local
    return 0, 1, 0


def allow_tf32(allowed: bool) -> None:
    """Sets whether GPUs may round the factors of float32 products to TF32, with 10 bits instead of 23."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed  # of convolutions, true by default


def preferred_attention(name: str | None) -> AbstractContextManager[None]:
    """Returns a context in which GPUs compute attention with this kernel where it can, and else as without it.

    None leaves the choice to torch. Raises ValueError for an unknown name.
    """
    if name is None:
        return nullcontext()
    if name not in ATTENTION:
        raise ValueError(f"attention is {name!r}, but must be one of {', '.join(ATTENTION)}, or null")
    others = [kernel for other, kernel in ATTENTION.items() if other != name]
    return sdpa_kernel([ATTENTION[name], *others, SDPBackend.MATH], set_priority=True)


def has_bf16(device: torch.device) -> bool:
    """Returns whether the device has bfloat16 instructions; without them it is emulated, far slower than float32."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def has_amx() -> bool:
    """Returns whether the CPU has instructions that multiply bfloat16 matrices (AMX)."""
    return torch.cpu.get_capabilities().get("amx_bf16", False)
