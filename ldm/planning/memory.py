"""The memory that a GPU holds throughout a training, by what it is for."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.nn.backbone import Backbone, trainable
from ldm.planning.config_tree import find, named
from ldm.planning.settings import compute


def memory(
    config: dict[str, Any], trained: nn.Module, frozen: list[nn.Module], gpus: int, sharded: bool
) -> dict[str, int]:
    """Bytes that a GPU holds all the time, by what they are."""
    strategy, parameters = config["trainer"]["strategy"], list(trainable(trained).values())
    gradients = size(parameters)
    state = {"weights": size(trained.parameters()), "gradients": gradients}
    state["optimizer"] = optimizer_state(config["optimizer"], parameters)
    if (ema := config["ema"]) and ema.get("device") != "cpu":
        each = getattr(torch, ema.get("dtype", "float32")).itemsize * len(ema.get("lengths", [None]))
        state["EMA"] = each * sum(p.numel() for p in parameters)  # in its own type, whatever that of the weights
    if sharded:
        state = {f"{name}, sharded": -(-held // gpus) for name, held in state.items()}
        state["gathered"] = gathered(trained, compute(config))
    elif gpus > 1 and not find(strategy, "gradient_as_bucket_view"):
        state["buckets of DDP"] = gradients
    if frozen:
        state["frozen networks"] = sum(size(network.parameters()) for network in frozen)
    return state


def gathered(trained: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the weights that FSDP2 has gathered at its peak: those in no repeated block, of the largest block, and
    of the next. The gathered gradients of a block come later, when old ones have gone.
    """
    everywhere = sum(p.numel() for p in trained.parameters())
    repeated = trained.repeated_blocks() if isinstance(trained, Backbone) else []
    blocks = [sum(p.numel() for p in block.parameters()) for block in repeated] or [0]
    return dtype.itemsize * (everywhere - sum(blocks) + 2 * max(blocks))


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def optimizer_state(node: dict[str, Any], parameters: list[nn.Parameter]) -> int:
    """Bytes that the optimizer keeps after its first step, which it takes on the meta device."""
    options = {key: value for key, value in node.items() if key not in ("_target_", "_partial_", "fused", "foreach")}
    optimizer = named(node["_target_"])(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return size(value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
