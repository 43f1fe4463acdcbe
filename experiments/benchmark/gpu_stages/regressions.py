"""Repeats on a GPU what failed or was silently wrong there by a reading of the code, without Lightning."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmark.gpu import Line
from experiments.benchmark.gpu_stages.context import Context, filled
from ldm.conditioning import Conditioning
from ldm.device import allow_tf32
from ldm.diffusion.schedule import Schedule, scaled_linear, zero_terminal_snr
from ldm.execution.offload import Offload, in_batches, is_out_of_memory
from ldm.nn.layers import GroupNorm
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE

TINY_VAE = {"widths": (32, 32), "blocks": 1, "groups": 4}


def regressions(context: Context) -> Iterator[Line]:
    """Yields the result of each case, or the error that it raised; all of them run."""
    for case in (tiles_with_offload, layouts, out_of_memory, schedules, exact_float32, utilisation):
        yield {case.__name__: result(case, context)}


def result(case: Callable[[Context], Any], context: Context) -> Any:
    try:
        return case(context)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def tiles_with_offload(context: Context) -> Line:
    """Decodes in tiles with offload=sequential, which moves weights away between the calls of layers."""
    vae = filled(lambda: VAE(**TINY_VAE), torch.device("cpu")).eval()  # type: ignore[arg-type]
    z = torch.randn(1, 4, 16, 16, device=context.device)
    with torch.no_grad(), Offload(context.device, "sequential").using(vae):
        tiled, plain = vae.decode(z, tile=16), vae.decode(z)
    return {"relative_error": float((tiled - plain).norm() / plain.norm())}


def layouts(context: Context) -> Line:
    """Counts the group normalisations of a UNet that return another memory layout than they are given."""
    unet = filled(lambda: UNet(width=32, context_width=16, groups=8), context.device)
    lost = []

    def watch(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        given = inputs[0].is_contiguous(memory_format=torch.channels_last)
        lost.append(given and not output.is_contiguous(memory_format=torch.channels_last))

    for module in unet.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_hook(watch)
    x = torch.randn(2, 4, 16, 16, device=context.device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        text = torch.randn(2, 7, 16, device=context.device)
        unet(x, torch.full((2,), 500.0, device=context.device), Conditioning(text=text))
    return {"normalisations": len(lost), "layout_lost": sum(lost)}


def out_of_memory(context: Context) -> Line:
    """Recognises CUDA's error, and continues with half the batch."""

    def work(batch: list[int], *_: int) -> Tensor:
        if len(batch) > 1:
            torch.empty(2**50, dtype=torch.uint8, device=context.device)
        return torch.zeros(len(batch))

    warned: list[str] = []
    sizes = [len(batch) for batch, _ in in_batches([1, 2, 3], 2, work, warned.append)]
    try:
        torch.empty(2**50, dtype=torch.uint8, device=context.device)
    except RuntimeError as error:
        return {"recognised": is_out_of_memory(error), "batches": sizes, "warnings": len(warned)}
    raise RuntimeError("a petabyte was allocated")


def schedules(context: Context) -> Line:
    """Compares alpha and sigma in float64 with those of the CPU."""
    t = torch.arange(1000, dtype=torch.float64)
    kinds: dict[str, Schedule] = {"scaled_linear": scaled_linear(), "zero": zero_terminal_snr(scaled_linear())}
    return {
        name: max(
            float((function(t.to(context.device)).cpu() - function(t)).abs().max())
            for function in (kind.alpha, kind.sigma)
        )
        for name, kind in kinds.items()
    }


def exact_float32(context: Context) -> Line:
    """Returns the relative error of a float32 product without and with TF32, with respect to float64."""
    a, b = (torch.randn(256, 256, device=context.device) for _ in range(2))
    exact, found = a.double() @ b.double(), {}
    for name, allowed in (("float32", False), ("tf32", True)):
        allow_tf32(allowed)
        found[name] = float((a @ b - exact).norm() / exact.norm())
    return found


def utilisation(context: Context) -> Line:
    """Returns NVML's utilisation, or its error, which training ignores."""
    if not context.gpu_only("NVML"):
        return {}
    try:
        return {"percent": torch.cuda.utilization(context.device)}
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
