"""Computes the share of a UNet's activations that torch.compile keeps for the backward pass, without a GPU.

    python -m experiments.benchmark.activations      four minutes and 6 GB of memory for Stable Diffusion 1.5 at 512 px

torch.compile divides the joint graph of both passes by a minimum cut: what the backward pass can compute again from
fewer bytes is not kept. The graph is that of a CPU, with inductor's decompositions and bfloat16 autocast. The casts of
weights do not count, because their size does not depend on the batch.
"""

import json
from functools import partial
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule, Node

from ldm.conditioning import Conditioning
from ldm.nn.unet import UNet
from ldm.planning.flops import measure

SAME_VALUES = "convert_element_type", "clone", "alias", "permute", "view", "unsqueeze", "expand"  # views and casts
TOKENS = 77


def inputs(unet: UNet, side: int, batch: int = 1) -> tuple[Any, ...]:
    """Returns noisy latents (batch, c, side, side), times and text states for the network, on the default device."""
    x = torch.zeros(batch, unet.latent_channels, side, side).contiguous(memory_format=torch.channels_last)
    return x, torch.zeros(batch), Conditioning(text=torch.zeros(batch, TOKENS, unet.reads["text"]))


def kept_by_compilation(unet: UNet, side: int) -> int:
    """Returns the bytes of activations that the compiled forward pass keeps for one image."""
    kept: list[int] = []

    def count(graph: GraphModule, _: Any) -> Any:
        (outputs,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        saved = {node for node in outputs[1:] if isinstance(node, Node) and not _is_weight(node)}
        kept.append(sum(_bytes(node.meta["val"]) for node in saved))
        return graph

    passes = {"fw_compiler": count, "bw_compiler": lambda graph, _: graph}
    how = {"partition_fn": min_cut_rematerialization_partition, "decompositions": select_decomp_table()}
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(unet, backend=aot_autograd(**passes, **how), dynamic=False)(*inputs(unet, side))
    return kept[0]


def _is_weight(node: Node) -> bool:
    """Returns whether the node is an input of the graph, or a view or cast of one."""
    while node.op == "call_function" and any(name in str(node.target) for name in SAME_VALUES):
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def kept_eagerly(config: dict[str, Any], side: int) -> int:
    """Returns the bytes of activations per image that debug=plan computes."""
    with torch.device("meta"):
        unet = UNet(**config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        one, two = (partial(unet, *inputs(unet, side, batch)) for batch in (1, 2))
    return measure(two, torch.bfloat16, backward=False).saved - measure(one, torch.bfloat16, backward=False).saved


def main() -> None:
    unet, side = UNet().to(memory_format=torch.channels_last), 64  # type: ignore[call-overload]
    eager, compiled = kept_eagerly(unet.config, side), kept_by_compilation(unet, side)
    print(json.dumps({"eager_gib": eager / 2**30, "compiled_gib": compiled / 2**30, "share": compiled / eager}))


if __name__ == "__main__":
    main()
