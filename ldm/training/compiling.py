"""Compiles the denoising network for training."""

import torch

from ldm.diffusion.denoiser import Network
from ldm.nn.backbone import Backbone

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # the modes that run the network as CUDA graphs
MAX_SIZES = 64  # of images, for each of which the network is compiled; torch stops compiling after 8 by default


def compiled(backbone: Backbone, mode: str | None) -> Network:
    """Compiles the network for calls with gradients, once for each size of images.

    Validation and sampling, whose shapes vary, call the uncompiled network. `mode` is one of COMPILE_MODES, or None
    for no compilation.
    """
    if mode is None:
        return backbone
    if mode not in COMPILE_MODES:
        raise ValueError(
            f"training.compile={mode} is not a mode of torch.compile: choose {', '.join(COMPILE_MODES)} or null"
        )
    fast = torch.compile(backbone, mode=mode, dynamic=False, recompile_limit=MAX_SIZES)  # type: ignore[call-overload]
    return lambda *inputs: (fast if torch.is_grad_enabled() else backbone)(*inputs)


def check_accumulation(mode: str | None, batches: int) -> None:
    """Raises ValueError if gradients of several batches cannot be accumulated."""
    if mode in CUDA_GRAPHS and batches > 1:
        raise ValueError(
            f"training.compile={mode} keeps gradients in the memory of CUDA graphs, which each batch "
            "overwrites, so that they cannot be accumulated: choose training.compile=default, or set "
            "data.global_batch to data.batch_size x the number of GPUs"
        )
