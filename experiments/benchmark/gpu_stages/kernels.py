"""Measures single operations: keyed noise, attention by head width and backend, and group normalisation."""

import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.benchmark.gpu import Line
from experiments.benchmark.gpu_stages.context import Context, attempt
from ldm.device import ATTENTION
from ldm.kernels.available import can_run
from ldm.nn.layers import GroupNorm, normalize_and_activate
from ldm.random import DISTRIBUTIONS, normal, uniform

BACKENDS = ATTENTION | {"math": SDPBackend.MATH}
Layer = Callable[[Tensor], Tensor]
MATH_QUERIES = 1024  # with more, the scores of the math backend would take tens of gigabytes


class Operations(TorchDispatchMode):
    """Counts the operations on tensors, which eager mode runs as about one kernel each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def noise(context: Context) -> Iterator[Line]:
    """Compares keyed random numbers with those of the CPU, and measures them as one kernel and as many operations."""
    shape, ids = (4, context.size.side, context.size.side), torch.arange(context.size.batch) + 2**33
    draw = torch.full_like(ids, 5)
    on_device = ids.to(context.device), draw.to(context.device)
    ours, theirs = normal(3, "noise", *on_device, shape), normal(3, "noise", ids, draw, shape)
    yield {"triton": can_run(context.device), "normal": agreement(ours.cpu(), theirs)}
    yield {"uniform": agreement(uniform(3, "time", *on_device, shape).cpu(), uniform(3, "time", ids, draw, shape))}
    yield {"seconds": context.seconds(lambda: normal(3, "noise", *on_device, shape))}
    key, count = (3, zlib.crc32(b"noise")), math.prod(shape)
    by_operations = partial(DISTRIBUTIONS["normal"], key, *on_device, count)
    with Operations() as operations:
        numbers = by_operations()
    yield {"by_operations": agreement(numbers.view(ours.shape).cpu(), theirs), "operations": operations.count}
    yield {"seconds_by_operations": context.seconds(by_operations)}


def agreement(a: Tensor, b: Tensor) -> Line:
    return {"numbers": a.numel(), "different": int((a != b).sum()), "largest_difference": float((a - b).abs().max())}


def attention(context: Context) -> Iterator[Line]:
    """Measures forward and backward passes of Stable Diffusion's attention by backend: seconds, or why it failed."""
    for queries, keys, width in context.size.attention:
        found: dict[str, Any] = {"default": attempt(lambda: attended(context, queries, keys, width, None))}  # noqa: B023
        for name, backend in BACKENDS.items():
            if name == "math" and queries > MATH_QUERIES:
                continue
            found[name] = attempt(lambda: attended(context, queries, keys, width, backend))  # noqa: B023
        flops = 4 * 3.5 * context.size.batch * context.size.heads * queries * keys * width
        yield {f"{queries}x{keys}x{width}": {"seconds": found, "flops": flops}}
    yield {"errors": {name: attempt(lambda: error(context, backend)) for name, backend in BACKENDS.items()}}  # noqa: B023


def heads_of(context: Context, batch: int, length: int, width: int) -> Tensor:
    """Returns random (b, heads, n, d) with the strides that a linear layer gives them."""
    flat = torch.randn(batch, length, context.size.heads * width, device=context.device, dtype=torch.bfloat16)
    return flat.requires_grad_().unflatten(-1, (context.size.heads, -1)).transpose(1, 2)


def attended(context: Context, queries: int, keys: int, width: int, backend: SDPBackend | None) -> float:
    """Returns the seconds of attention, forward and backward."""
    q, k, v = (heads_of(context, context.size.batch, length, width) for length in (queries, keys, keys))
    gradient = torch.randn_like(q)

    def work() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), gradient)

    if backend is None:
        return context.mean_seconds(work, 10)
    with sdpa_kernel([backend]):
        return context.mean_seconds(work, 10)


def error(context: Context, backend: SDPBackend) -> float:
    """Returns the relative error of attention in bfloat16, with respect to float64."""
    length, _, width = context.size.attention[-1]
    q, k, v = (heads_of(context, 1, length, width).detach() for _ in range(3))
    with sdpa_kernel([SDPBackend.MATH]):
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with sdpa_kernel([backend]):
        out = F.scaled_dot_product_attention(q, k, v)
    return float((out - exact).norm() / exact.norm())


def layers(context: Context) -> Iterator[Line]:
    """Measures group normalisation with SiLU, forward and backward, and the workspaces of convolutions."""
    for inputs, outputs, side in context.size.convolutions:
        yield {f"workspace_{inputs}x{outputs}x{side}x{side}_bytes": workspace(context, inputs, outputs, side)}
    yield from norms(context)


def workspace(context: Context, inputs: int, outputs: int, side: int) -> int | None:
    """Returns the peak bytes of the backward pass of a 3x3 convolution in bfloat16, besides its tensors."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, device=context.device, dtype=torch.bfloat16)
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(context.size.batch, inputs, side, side, device=context.device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    out = layer(x)
    gradient = torch.randn_like(out)
    context.forget_peak()
    before = context.peak()
    gradients = torch.autograd.grad(out, (x, *layer.parameters()), gradient)
    peak = context.peak()
    return None if before is None or peak is None else peak - before - sum(tensor.nbytes for tensor in gradients)


def norms(context: Context) -> Iterator[Line]:
    """Measures group normalisation under autocast, in the layouts of training."""
    for channels, side in context.size.maps:
        norm = GroupNorm(32, channels).to(context.device)
        x = torch.randn(context.size.batch, channels, side, side, device=context.device, dtype=torch.bfloat16)
        nhwc = x.contiguous(memory_format=torch.channels_last)
        plain, fused = nn.GroupNorm(32, channels).to(context.device), GroupNorm(32, channels).to(context.device)
        fused.fused = can_run(context.device)
        variants: dict[str, tuple[Tensor, Layer, bool]] = {
            "ours_nhwc": (nhwc, with_silu(norm), True),
            "fused_nhwc": (nhwc, partial(normalize_and_activate, fused), True),
            "torch_nchw": (x, with_silu(plain), True),
            "ours_nhwc_in_bfloat16": (nhwc, with_silu(partial(in_bfloat16, norm)), False),
            "compiled_nhwc": (nhwc, torch.compile(with_silu(norm), dynamic=False), True),
        }
        seconds = {name: attempt(lambda: normalised(context, *variant)) for name, variant in variants.items()}  # noqa: B023
        yield {f"{channels}x{side}x{side}": {"seconds": seconds, "bytes_of_input": 2 * x.numel()}}
    context.gpu_only("torch.compile")


def with_silu(norm: Layer) -> Layer:
    return lambda x: F.silu(norm(x))


def in_bfloat16(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    out = F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    return out.contiguous(memory_format=torch.channels_last)


def normalised(context: Context, x: Tensor, work: Layer, autocast: bool) -> float:
    """Returns the seconds of a forward and a backward pass."""
    x, gradient = x.detach().requires_grad_(), torch.randn_like(x)

    def step() -> None:
        with torch.autocast(context.device.type, torch.bfloat16, enabled=autocast):
            out = work(x)
        torch.autograd.grad(out, x, gradient.to(out.dtype))

    return context.mean_seconds(step, 10)
