"""Measures what fraction of the machine's rate of matrix products the layers of a network reach on the CPU.

Operations on the CPU are synchronous, so that hooks before and after a layer give its time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.execution.cpu_packing import PackedConv2d, PackedLinear
from ldm.nn.attention import Attention

LAYERS = {nn.Conv2d: "convolutions", PackedConv2d: "convolutions", nn.Linear: "linear", PackedLinear: "linear"}


def peak(dtype: torch.dtype, size: int = 3072, seconds: float = 3.0) -> float:
    """Returns the FLOP/s of the fastest product of two square matrices within some seconds."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    until, fastest = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < until:
        began = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest


def shares(network: nn.Module, call: Callable[[], object], rate: float) -> dict[str, Any]:
    """Returns FLOPs, seconds and the fraction of `rate`, in FLOP/s, by kind of layer, for one call of the network.

    The time of attention is that of its products and softmax, without the linear layers around them. "all" is the
    whole call, with everything between the layers.
    """
    flops = dict.fromkeys(["convolutions", "linear", "attention"], 0.0)
    seconds = dict(flops)
    with _hooks(network, flops, seconds):
        began = time.perf_counter()
        call()
        total = time.perf_counter() - began
    flops, seconds = flops | {"all": sum(flops.values())}, seconds | {"all": total}
    return {
        kind: {"flops": flops[kind], "seconds": seconds[kind], "of_peak": flops[kind] / seconds[kind] / rate}
        for kind in flops
        if seconds[kind]
    }


@contextmanager
def _hooks(network: nn.Module, flops: dict[str, float], seconds: dict[str, float]) -> Iterator[None]:
    layers = [layer for layer in network.modules() if isinstance(layer, (Attention, *LAYERS))]
    products = {
        layer: cast(Tensor, layer.weight)[0].numel() for layer in layers if not isinstance(layer, Attention)
    }  # per output
    running: list[float] = []  # start times of the layers that have begun

    def begin(*_: object) -> None:
        running.append(time.perf_counter())

    def end(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        took = time.perf_counter() - running.pop()
        if isinstance(layer, Attention):
            keys = (inputs[1] if len(inputs) > 1 else inputs[0]).shape[1]
            flops["attention"] += 4 * out.numel() * keys
            seconds["attention"] += took
            return
        kind = LAYERS[type(layer)]
        flops[kind] += 2 * out.numel() * products[layer]
        seconds[kind] += took
        if running:  # a linear layer inside attention
            seconds["attention"] -= took

    handles = [layer.register_forward_pre_hook(begin) for layer in layers]
    handles += [layer.register_forward_hook(end) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
