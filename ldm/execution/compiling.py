"""Compiles the denoising network for sampling."""

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
    """Compiles the network at its first call, which takes a minute, for that image size and batches of 2 or more.

    Raises ValueError without a C++ compiler, and for networks that offloading moves between devices.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"compile needs a C++ compiler, but {compiler} was not found: install it, or sample without compile"
        )
    if offload.mode != "none":
        raise ValueError(f"a compiled network cannot be offloaded: leave out compile, or offload={offload.mode}")
    fast = torch.compile(backbone)

    def run(x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        # All inputs get the same batch size, so that the network is compiled only once.
        times = max(1, len(conditioning) // len(x))
        x, time = torch.cat([x] * times), torch.cat([time] * times)
        hints = {name: repeat_batch(hint, x) for name, hint in conditioning.hints.items()}
        conditioning = replace(conditioning, hints=hints)
        for tensor in (x, time, *(tensor for _, tensor in conditioning.named())):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return fast(x, time, conditioning)

    return run
