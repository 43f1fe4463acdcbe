"""The denoising network, compiled for sampling."""

import os
import shutil
from dataclasses import replace

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Network
from ldm.execution.offload import Offload
from ldm.nn.attention import repeat_batch
from ldm.nn.backbone import Backbone


def compiled(backbone: Backbone, offload: Offload) -> Network:
    """Compiled at its first call, which takes a minute, for that size of pictures and all batches of two or more.

    Raises ValueError where torch has no compiler to do it with, and for networks that move about.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"compiling needs a C++ compiler, but there is no {compiler} here: install it, or draw without compile"
        )
    if offload.mode != "none":
        raise ValueError(f"a compiled network stays where it is: leave out compile, or offload={offload.mode}")
    fast = torch.compile(backbone)

    def run(x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        # one batch size for all inputs, so that it is compiled once
        times = max(1, len(conditioning) // len(x))
        x, time = torch.cat([x] * times), torch.cat([time] * times)
        hints = {name: repeat_batch(hint, x) for name, hint in conditioning.hints.items()}
        conditioning = replace(conditioning, hints=hints)
        for one in (x, time, *(tensor for _, tensor in conditioning.named())):
            torch._dynamo.maybe_mark_dynamic(one, 0)
        return fast(x, time, conditioning)

    return run
