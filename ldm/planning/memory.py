"""Computes the memory that a GPU holds throughout training, by purpose."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.nn.backbone import Backbone, trainable
from ldm.planning.config_tree import find, import_target
from ldm.planning.settings import compute_dtype

BLOCK = 256  # elements that share a scale, in bitsandbytes
CUBLAS_WORKSPACE = 32 * 2**20  # torch's default on Hopper, for the stream of a step; 8.1 MiB on older GPUs
MIN_8BIT = 4096  # smaller weights keep moments in float32, in bitsandbytes


def adamw_8bit_bytes(weight: Tensor) -> int:
    """Returns the bytes of two moments: a byte each per element, and for each block a scale in float32."""
    n = weight.numel()
    return 8 * n if n < MIN_8BIT else 2 * (n + 4 * -(-n // BLOCK))


def prodigy_bytes(weight: Tensor) -> int:
    """Returns the bytes of two moments, the initial weight, and the sum that estimates the step size."""
    return 4 * weight.nbytes


# The state of optimizers whose step cannot run on the meta device, by the name of their constructor.
STATE_BYTES = {"adamw_8bit": adamw_8bit_bytes, "prodigy": prodigy_bytes}


def memory(
    config: dict[str, Any], trained: nn.Module, frozen: list[nn.Module], gpus: int, sharded: bool
) -> dict[str, int]:
    """Returns the bytes that a GPU holds permanently, by purpose; some weights of `frozen` networks may be trained.

    Gradients count as permanent, although without DDP they are freed after each step: the sum with all activations,
    of which the backward pass frees more and more, is an upper bound.
    """
    strategy = config["trainer"]["strategy"]
    parameters = [weight for network in (trained, *frozen) for weight in trainable(network).values()]
    gradients = total_bytes(parameters)
    state = {"weights": total_bytes(trained.parameters()), "gradients": gradients}
    state["optimizer"] = optimizer_state(config["optimizer"], parameters)
    if (ema := config["ema"]) and ema.get("device") != "cpu":
        per_weight = getattr(torch, ema.get("dtype", "float32")).itemsize * len(ema.get("lengths", [None]))
        state["EMA"] = per_weight * sum(p.numel() for p in parameters)  # in its own dtype, not that of the weights
    if sharded:
        state = {f"{name}, sharded": -(-held // gpus) for name, held in state.items()}
        state["gathered"] = gathered_bytes(trained, compute_dtype(config))
    elif gpus > 1 and not find(strategy, "gradient_as_bucket_view"):
        state["DDP buckets"] = gradients
    if frozen:
        state["other networks" if any(trainable(network) for network in frozen) else "frozen networks"] = sum(
            total_bytes(network.parameters()) for network in frozen
        )
    return state


def checkpoint_copy(held: dict[str, int]) -> int:
    """Returns the bytes of CPU memory for a copy of what a GPU holds and a checkpoint contains."""
    copied = "gradients", "optimizer", "EMA"  # the gradients are as large as the trained weights
    return sum(size for name, size in held.items() if name.removesuffix(", sharded") in copied)


def workspaces(trained: nn.Module) -> int:
    """Returns the bytes that cuBLAS and cuDNN are assumed to need besides the tensors of a step.

    cuDNN's kernels for the gradient of a weight split a sum over pixels into parts, which they add in float32. One copy
    of the largest convolution weight is assumed, because the allocator uses the memory of one call for the next.
    """
    convolutions = [module.weight.numel() for module in trained.modules() if isinstance(module, nn.Conv2d)]
    return CUBLAS_WORKSPACE + 4 * max(convolutions, default=0)


def gathered_bytes(trained: nn.Module, dtype: torch.dtype) -> int:
    """Returns the peak bytes of weights gathered by FSDP2: those outside the blocks, the largest block, and the next.

    The gathered gradients of a block are not included: they exist later, after earlier buffers are freed.
    """
    total = sum(p.numel() for p in trained.parameters())
    repeated = trained.repeated_blocks() if isinstance(trained, Backbone) else []
    blocks = [sum(p.numel() for p in block.parameters()) for block in repeated] or [0]
    return dtype.itemsize * (total - sum(blocks) + 2 * max(blocks))


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def optimizer_state(node: dict[str, Any], parameters: list[nn.Parameter]) -> int:
    """Returns the bytes of the optimizer's state after its first step, taken on the meta device where that works."""
    if (state_bytes := STATE_BYTES.get(node["_target_"].rpartition(".")[2])) is not None:
        return sum(state_bytes(parameter) for parameter in parameters)
    options = {key: value for key, value in node.items() if key not in ("_target_", "_partial_", "fused", "foreach")}
    optimizer = import_target(node["_target_"])(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return total_bytes(
        value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )
