"""A network whose weights, gradients and optimizer state are spread over all ranks by FSDP2."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ldm.conditioning import Conditioning
from ldm.nn.backbone import Backbone


def shard(backbone: Backbone, dtype: torch.dtype | None = None) -> None:
    """Shards each repeated block, and the rest, over all ranks; a second call changes nothing.

    With `dtype` the network computes in it from float32 weights, cast as they are gathered, and gradients are added up
    in float32. FSDP2 would cast the time too, of which bfloat16 can only tell 256 values apart: hence the hook.
    """
    if isinstance(backbone, FSDPModule):
        return
    backbone.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 takes no other
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in backbone.repeated_blocks():
        fully_shard(block, mp_policy=policy)
    # Resharded, because after a forward pass without a backward one its weights must be parts again, too.
    fully_shard(backbone, mp_policy=replace(policy, output_dtype=torch.float32), reshard_after_forward=True)
    if dtype is not None:

        def cast(_: nn.Module, inputs: tuple[Tensor, Tensor, Conditioning]) -> tuple[Tensor, Tensor, Conditioning]:
            x, time, conditioning = inputs
            return x.to(dtype), time, conditioning.to(dtype=dtype)

        backbone.register_forward_pre_hook(cast)


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one of which each rank holds a part: every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This rank's part of a whole tensor, if it holds but a part of `other`, and laid out in memory as that is."""
    spread = tensor
    if isinstance(other, DTensor) and not isinstance(tensor, DTensor):
        spread = distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    elif tensor.stride() == other.stride():
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype).copy_(spread)


def distribute_state(optimizer: Optimizer) -> None:
    """Makes loaded state lie as its weight does, over ranks and in memory, which fused AdamW takes for granted."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[name] = distribute_like(value, weight)


def exchange(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Puts `value` in the place of what the parameter holds, which is returned.

    Nothing is copied but what is spread over ranks, since FSDP2 gathers it from where it lay at first.
    """
    if not isinstance(parameter, DTensor):
        held, parameter.data = parameter.data, value
        return held
    held = parameter.detach().clone()
    parameter.detach().copy_(value)
    return held
