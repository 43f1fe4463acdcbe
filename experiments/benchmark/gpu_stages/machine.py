"""Identifies the machine, and measures the rates that bound everything else: matrix products and copies."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from experiments.benchmark.gpu import Line
from experiments.benchmark.gpu_stages.context import Context
from ldm.device import allow_tf32

PACKAGES = ("torch", "triton", "numpy", "safetensors", "lightning", "torchmetrics", "transformers", "diffusers")


def machine(context: Context) -> Iterator[Line]:
    yield {"versions": {"python": platform.python_version(), **installed()}, "device": device_of(context)}
    yield {"matmul_flops_per_second": products(context)}
    yield {"copy_bytes_per_second": copies(context)}


def installed() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device_of(context: Context) -> Line:
    if not context.gpu_only("the properties of the GPU"):
        return {"name": platform.processor() or "cpu"}
    properties: Any = torch.cuda.get_device_properties(context.device)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def products(context: Context) -> dict[str, float]:
    """Returns FLOP/s of square products of random matrices, by dtype."""
    n = context.size.products
    found = {}
    for name, dtype in {"bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}.items():
        a, b = (torch.randn(n, n, device=context.device, dtype=dtype) for _ in range(2))
        allow_tf32(name == "tf32")
        found[name] = 2 * n**3 / context.mean_seconds(lambda: a @ b, 20)  # noqa: B023
    allow_tf32(True)  # as in training with precision=bf16-mixed
    return found


def copies(context: Context) -> dict[str, float]:
    """Returns bytes per second: on the device, read and written, and between it and pinned memory of the host."""
    count = context.size.copied
    a, b = (torch.randint(256, (count,), dtype=torch.uint8, device=context.device) for _ in range(2))
    found = {"device": 2 * count / context.mean_seconds(lambda: b.copy_(a), 10)}
    host = torch.empty(count // 4, dtype=torch.uint8, pin_memory=context.gpu_only("copies from pinned memory"))
    part = a[: len(host)]
    found["to_host"] = len(host) / context.mean_seconds(lambda: host.copy_(part, non_blocking=True), 5)
    found["from_host"] = len(host) / context.mean_seconds(lambda: part.copy_(host, non_blocking=True), 5)
    return found
