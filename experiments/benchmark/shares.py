"""Measures what fraction of the machine's peak, the rate of a matrix product, the layers of a network reach on the CPU.

Operations on the CPU are synchronous, so that hooks before and after a layer give its time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.execution.cpu_packing import FoldedUpsample, PackedConv2d, PackedLinear
from ldm.nn.attention import Attention
from ldm.nn.vae import PixelAttention

LAYERS = {
    **dict.fromkeys((nn.Conv2d, PackedConv2d, FoldedUpsample), "convolutions"),
    **dict.fromkeys((nn.Linear, PackedLinear), "linear"),
    **dict.fromkeys((Attention, PixelAttention), "attention"),
}


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

    The time of attention is that of its products and softmax, and of a normalisation inside it, without its linear
    layers. "all" is the entire call, with everything between the layers.
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
    layers = [layer for layer in network.modules() if type(layer) in LAYERS]
    products = {layer: _products(layer) for layer in layers}
    running: list[float] = []  # start times of the layers that have begun

    def begin(*_: object) -> None:
        running.append(time.perf_counter())

    def end(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        took, kind = time.perf_counter() - running.pop(), LAYERS[type(layer)]
        flops[kind] += 2 * out.numel() * products[layer](inputs)
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


def _products(layer: nn.Module) -> Callable[[tuple[Tensor, ...]], int]:
    """Returns a function of a layer's inputs: the multiplications for each number of its output."""
    match layer:
        case Attention():
            return lambda inputs: 2 * (inputs[1] if len(inputs) > 1 else inputs[0]).shape[1]
        case PixelAttention():
            return lambda inputs: 2 * inputs[0][0, 0].numel()
        case FoldedUpsample():
            return lambda _: 4 * layer.conv.in_channels
    weight = cast(Tensor, layer.weight)[0].numel()
    return lambda _: weight
