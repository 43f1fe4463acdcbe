"""Measures what the preparation of weights for the CPU saves: single layers, and the decoder of Stable Diffusion.

    ldm bench packing --json FILE

Convolutions are torch's own, packed by oneDNN without the size of their input, and packed for it, as `ldm` does;
upsampling and its convolution are plain and folded. The layers are those of the included UNet, and of Stable
Diffusion's UNet and decoder at 512x512.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmark.generate import PRECISIONS, ours, race
from ldm.execution.cpu_packing import ONEDNN, FoldedUpsample, PackedConv2d, can_pack, unpack
from ldm.nn.layers import Upsample

CONVOLUTIONS = {  # input size, output channels
    "included UNet": ((2, 192, 4, 4), 192),
    "included UNet, 8x8": ((2, 384, 8, 8), 192),
    "Stable Diffusion, 8x8": ((2, 1280, 8, 8), 1280),
    "Stable Diffusion, 64x64": ((2, 320, 64, 64), 320),
}
UPSAMPLING = {
    "UNet, from 8x8": (2, 1280, 8, 8),
    "UNet, from 16x16": (2, 1280, 16, 16),
    "UNet, from 32x32": (2, 640, 32, 32),
    "decoder, from 64x64": (1, 512, 64, 64),
    "decoder, from 128x128": (1, 512, 128, 128),
    "decoder, from 256x256": (1, 256, 256, 256),
}
SECONDS = 1.0  # for each layer


def milliseconds(call: Callable[[], object]) -> float:
    """Returns those of the fastest call, after two that prepare the weights."""
    call(), call()
    until, fastest = time.perf_counter() + SECONDS, float("inf")
    while time.perf_counter() < until:
        began = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - began)
    return 1000 * fastest


def channels_last(layer: nn.Module, size: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, Tensor]:
    """Returns the layer and a random input, both in channels-last layout."""
    made: Any = layer.requires_grad_(False).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return made, torch.randn(size).to(dtype, memory_format=torch.channels_last)


def convolution(size: tuple[int, ...], outputs: int, dtype: torch.dtype) -> dict[str, float]:
    plain, x = channels_last(nn.Conv2d(size[1], outputs, 3, padding=1), size, dtype)
    packed = PackedConv2d(plain)
    anyhow = ONEDNN._reorder_convolution_weight(plain.weight, *packed.arguments)
    return {
        "torch": milliseconds(lambda: plain(x)),
        "packed without the size": milliseconds(
            lambda: ONEDNN._convolution_pointwise(x, anyhow, plain.bias, *packed.arguments, "none", [], "")
        ),
        "packed for the size": milliseconds(lambda: packed(x)),
    }


def upsampling(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    plain, x = channels_last(Upsample(size[1]), size, dtype)
    folded = FoldedUpsample(plain)
    return {"plain": milliseconds(lambda: plain(x)), "folded": milliseconds(lambda: folded(x))}


def decoder(dtype: torch.dtype) -> dict[str, float]:
    """Returns the seconds of Stable Diffusion's decoder with folded and with plain upsampling."""
    folded, plain = (ours(dtype, 320).first_stage for _ in range(2))
    unpack(plain)
    z = torch.randn(1, 4, 64, 64)
    runs: Any = {"folded": lambda: folded.decode(z), "plain": lambda: plain.decode(z)}
    race(runs, 1)
    return {name: took["seconds"] for name, took in race(runs, 3).items()}


@torch.no_grad()
def measure() -> dict[str, Any]:
    return {
        name: {
            "convolutions, ms": {what: convolution(*layer, dtype) for what, layer in CONVOLUTIONS.items()},
            "upsampling, ms": {what: upsampling(size, dtype) for what, size in UPSAMPLING.items()},
            "decoder, s": decoder(dtype),
        }
        for name, dtype in PRECISIONS.items()
        if can_pack(torch.device("cpu"), dtype)
    } | {"threads": torch.get_num_threads(), "torch": torch.__version__}
