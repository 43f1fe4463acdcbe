"""The UNet, compiled for drawing."""

import os
import shutil

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Network
from ldm.memory import Offload
from ldm.nn.attention import repeated
from ldm.nn.unet import UNet


def compiled(unet: UNet, offload: Offload) -> Network:
    """Compiled at its first call, which takes a minute, for that size of pictures and all batches of two or more.

    Raises ValueError where torch has no compiler to do it with, and for networks that move about.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"compiling needs a C++ compiler, but there is no {compiler} here: install it, or draw without compile"
        )
    if offload.mode != "none":
        raise ValueError(f"a compiled UNet stays where it is: leave out compile, or offload={offload.mode}")
    fast = torch.compile(unet)

    def run(x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x, time = repeated(x, context), repeated(time, context)  # one batch for all inputs, so that it is compiled once
        for one in (x, time, context):
            torch._dynamo.maybe_mark_dynamic(one, 0)
        return fast(x, time, context)

    return run
