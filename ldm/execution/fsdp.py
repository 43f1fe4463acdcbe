"""Shards weights, gradients and optimizer state over all ranks with FSDP2."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ldm.conditioning import Conditioning
from ldm.nn.backbone import Backbone


def shard(backbone: Backbone, dtype: torch.dtype | None = None) -> None:
    """Shards each repeated block, and the remaining weights, over all ranks; a second call changes nothing.

    With `dtype` the network computes in it from float32 weights, which are cast as they are gathered, and gradients are
    reduced in float32. A hook casts the inputs, because FSDP2 would cast the time too, and bfloat16 cannot represent
    most of the 1000 times, and on GPUs converts x to channels-last layout, which the weights cannot have.
    """
    if isinstance(backbone, FSDPModule):
        return
    backbone.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 requires it
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in backbone.repeated_blocks():
        fully_shard(block, mp_policy=policy)
    # Resharding after the forward pass keeps the root's weights sharded when no backward pass follows.
    fully_shard(backbone, mp_policy=replace(policy, output_dtype=torch.float32), reshard_after_forward=True)

    def prepare(_: nn.Module, inputs: tuple[Tensor, Tensor, Conditioning]) -> tuple[Tensor, Tensor, Conditioning]:
        x, time, conditioning = inputs
        layout = torch.preserve_format if x.device.type == "cpu" else torch.channels_last
        return x.to(dtype=dtype, memory_format=layout), time, conditioning.to(dtype=dtype)

    backbone.register_forward_pre_hook(prepare)


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the tensor, gathered if it is sharded; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a sharded tensor, which shares its memory, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns the full `tensor` with the sharding (if any), device mesh and memory layout of `other`."""
    distributed = tensor
    if isinstance(other, DTensor) and not isinstance(tensor, DTensor):
        distributed = distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    elif tensor.stride() == other.stride():
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype).copy_(distributed)


def distribute_state(optimizer: Optimizer) -> None:
    """Shards loaded state, and lays it out in memory, like its weight, which fused AdamW assumes without a check."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[name] = distribute_like(value, weight)


def exchange(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Sets the parameter to `value` and returns its previous value.

    Only sharded parameters are copied, because FSDP2 gathers them from their original storage.
    """
    if not isinstance(parameter, DTensor):
        previous, parameter.data = parameter.data, value
        return previous
    previous = parameter.detach().clone()
    parameter.detach().copy_(value)
    return previous
