"""What a pass through a network costs, counted on the meta device, where tensors have shapes and no data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ldm.nn.backbone import Backbone

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Cost:
    """Floating-point operations (a multiply-add is two) and bytes kept for the backward pass at its peak."""

    forward: int
    backward: int
    saved: int


class AsOnGPU(TorchFunctionMode):
    """Attention that keeps no n x n matrix and, where `low` is given, CUDA's autocast to it."""

    lowered = (F.linear, F.conv2d, F.scaled_dot_product_attention)
    raised = (F.layer_norm, F.group_norm)

    def __init__(self, low: torch.dtype | None) -> None:
        super().__init__()
        self.low = low

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.low and (func in self.lowered or func in self.raised):
            dtype = self.low if func in self.lowered else torch.float32
            args = [a.to(dtype) if isinstance(a, Tensor) else a for a in args]
            kwargs = {key: a.to(dtype) if isinstance(a, Tensor) else a for key, a in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(*args, 0.0, kwargs.get("is_causal", False))[0]
        return func(*args, **kwargs)


def measure(forward: Forward, low: torch.dtype | None = None, grad: bool = True, backward: bool = True) -> Cost:
    """Of `forward` on meta tensors, autocast to `low`, and with `grad` of the backward pass of its sum.

    backward=False leaves the backward pass out, but counts what is kept for it.
    """
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            saved[tensor.untyped_storage()._cdata] = tensor  # which keeps the address from being used again
        return tensor

    with FlopCounterMode(display=False) as counter:
        with AsOnGPU(low), torch.set_grad_enabled(grad), saved_tensors_hooks(keep, lambda tensor: tensor):
            out = forward()
        flops = counter.get_total_flops()
        if backward and out.requires_grad:  # a block of which nothing is trained, nor before it, has none
            out.float().sum().backward()
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return Cost(flops, counter.get_total_flops() - flops, kept)


def measure_training(network: nn.Module, forward: Forward, low: torch.dtype | None = None) -> Cost:
    """`measure`, with gradient checkpointing where the network is set to it.

    Its repeated blocks then keep only their inputs, and each is recomputed, by itself, in the backward pass.
    """
    if not isinstance(network, Backbone) or not network.checkpointing:
        return measure(forward, low)
    kept = measure(forward, low, backward=False).saved
    blocks = [measure(call, low) for call in calls_of_blocks(network, forward, low)]
    network.checkpointing = False
    plain = measure(forward, low)
    network.checkpointing = True
    again = sum(block.forward for block in blocks)
    return Cost(plain.forward, plain.backward + again, kept + max(block.saved for block in blocks))


def calls_of_blocks(backbone: Backbone, forward: Forward, low: torch.dtype | None) -> list[Forward]:
    """The forward pass of each repeated block by itself, with the inputs that it gets in `forward`."""
    calls: list[Forward] = []

    def record(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(partial(block.forward, *(one.detach().requires_grad_(one.requires_grad) for one in inputs)))

    hooks = [block.register_forward_pre_hook(record) for block in backbone.repeated_blocks()]
    measure(forward, low, backward=False)
    for hook in hooks:
        hook.remove()
    return calls
