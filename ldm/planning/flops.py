"""Counts the FLOPs and saved activations of a network on the meta device, where tensors have shapes but no data."""

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
    """FLOPs (a multiply-add counts as two) and peak bytes saved for the backward pass."""

    forward: int
    backward: int
    saved: int


class GPUEmulation(TorchFunctionMode):
    """Emulates flash attention, which saves no (n, n) matrix, and, if `low` is given, CUDA's autocast to it."""

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
    """Measures `forward` on meta tensors, autocast to `low`, and, with `grad`, the backward pass of its sum.

    backward=False skips the backward pass, but counts the bytes saved for it.
    """
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            saved[tensor.untyped_storage()._cdata] = tensor  # a reference, so that the address is not reused
        return tensor

    with FlopCounterMode(display=False) as counter:
        with GPUEmulation(low), torch.set_grad_enabled(grad), saved_tensors_hooks(keep, lambda tensor: tensor):
            out = forward()
        flops = counter.get_total_flops()
        if backward and out.requires_grad:  # false if neither the block nor anything before it is trained
            out.float().sum().backward()
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return Cost(flops, counter.get_total_flops() - flops, kept)


def measure_training(network: nn.Module, forward: Forward, low: torch.dtype | None = None) -> Cost:
    """Like `measure`, with gradient checkpointing if the network enables it.

    The repeated blocks then save only their inputs, and each is recomputed, one at a time, in the backward pass.
    """
    if not isinstance(network, Backbone) or not network.checkpointing:
        return measure(forward, low)
    calls, kept = block_calls(network, forward, low)
    blocks = [measure(call, low, backward=False) for call in calls]
    network.checkpointing = False
    plain = measure(forward, low)
    network.checkpointing = True
    recomputed = sum(block.forward for block in blocks)
    return Cost(plain.forward, plain.backward + recomputed, kept + max(block.saved for block in blocks))


def block_calls(backbone: Backbone, forward: Forward, low: torch.dtype | None) -> tuple[list[Forward], int]:
    """Returns the forward pass of each repeated block, with the inputs that it receives in `forward`, and the bytes
    that `forward` saves."""
    calls: list[Forward] = []

    def record(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(partial(block.forward, *(x.detach().requires_grad_(x.requires_grad) for x in inputs)))

    hooks = [block.register_forward_pre_hook(record) for block in backbone.repeated_blocks()]
    cost = measure(forward, low, backward=False)  # with gradients, which only some inputs require if weights are frozen
    for hook in hooks:
        hook.remove()
    return calls, cost.saved
