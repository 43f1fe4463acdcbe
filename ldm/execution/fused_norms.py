"""Runs the group normalisations of a network, with the SiLU after them, as Triton kernels."""

import torch
from torch import nn

from ldm.kernels.available import can_run
from ldm.nn.layers import GroupNorm


def fuse_norms(network: nn.Module, device: torch.device) -> None:
    """Makes the network use `ldm.kernels.group_norm`; raises ValueError if it cannot run there or has no such layer."""
    norms = [module for module in network.modules() if isinstance(module, GroupNorm)]
    if not norms:
        raise ValueError(
            f"training.fused_norms needs a network with group normalisation, which a {type(network).__name__} lacks"
        )
    if not can_run(device):
        raise ValueError(
            f"training.fused_norms needs an NVIDIA GPU of 2020 or later, Triton and a C compiler, but the device is "
            f"{device}" + (" and one of them is missing" if device.type == "cuda" else "")
        )
    for norm in norms:
        norm.fused = True
