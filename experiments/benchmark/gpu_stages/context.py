"""What a stage measures with: the device, the sizes of networks and batches, and a clock."""

import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from experiments.benchmark.gpu import RESULTS, Line

Stage = Callable[["Context"], Iterator[Line]]


@dataclass(frozen=True)
class Size:
    """The networks (arguments of their constructors), batches and repetitions of all stages."""

    unet: dict[str, Any]
    tower: dict[str, Any]
    vae: dict[str, Any]
    side: int  # of latents
    batch: int  # of eager training
    compiled_batch: int
    drawing_batches: tuple[int, ...]  # the first is 1
    drawing_steps: tuple[int, ...]
    steps: int  # to measure in training
    products: int  # rows and columns of the matrices to multiply
    copied: int  # bytes
    attention: tuple[tuple[int, int, int], ...]  # queries, keys, width of a head
    heads: int
    maps: tuple[tuple[int, int], ...]  # channels and side of feature maps
    convolutions: tuple[tuple[int, int, int], ...]  # input and output channels, side
    small: dict[str, Any]  # a network for runs that are killed and resumed
    saved: dict[str, Any]  # a network for runs whose checkpoints are timed
    tests: tuple[str, ...]  # files with tests marked cuda


FULL = Size(
    unet={},  # Stable Diffusion 1.5's
    tower={},
    vae={},
    side=64,
    batch=32,
    compiled_batch=64,
    drawing_batches=(1, 8),
    drawing_steps=(20, 50),
    steps=8,
    products=8192,
    copied=2**31,
    attention=((4096, 4096, 40), (1024, 1024, 80), (256, 256, 160), (4096, 77, 40), (1024, 77, 80), (256, 77, 160)),
    heads=8,
    maps=((320, 64), (640, 32), (1280, 16)),
    convolutions=((2560, 1280, 8), (2560, 1280, 16), (1920, 640, 32), (960, 320, 64)),
    small={"width": 64},
    saved={"width": 128},
    tests=(
        "tests/test_device.py",
        "tests/nn/test_layers.py",
        "tests/callbacks/averages/test_ema.py",
        "tests/training/test_device_waits.py",
    ),
)
TINY_UNET = {"width": 8, "multipliers": (1, 2), "blocks": 1, "depth": (0, 1), "heads": 2, "groups": 4}
TINY = Size(
    unet={**TINY_UNET, "context_width": 16},
    tower={"width": 16, "layers": 1, "heads": 2},
    vae={"widths": (8, 8), "blocks": 1, "groups": 4},
    side=8,
    batch=2,
    compiled_batch=2,
    drawing_batches=(1, 2),
    drawing_steps=(2, 3),
    steps=2,
    products=16,
    copied=2**12,
    attention=((16, 16, 8), (16, 5, 8)),
    heads=2,
    maps=((32, 8),),
    convolutions=((8, 8, 4),),
    small={**TINY_UNET, "context_width": 16},
    saved={**TINY_UNET, "context_width": 16},
    tests=("tests/test_device.py",),
)
SIZES = {"full": FULL, "tiny": TINY}


@dataclass
class Context:
    """What the stages of one process share."""

    device: torch.device
    size: Size
    folder: Path
    shared: dict[str, Any] = field(default_factory=dict)  # what a stage leaves for a later one
    not_run: set[str] = field(default_factory=set)  # what this device cannot run

    @classmethod
    def of(cls, size: str, device: str, folder: Path) -> "Context":
        """Raises RuntimeError without a GPU, unless `device` is cpu, where compiled functions run eagerly."""
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("there is no GPU: rehearse with --size tiny --device cpu")
        if device == "cpu":
            torch.compiler.set_stance("force_eager")
        return cls(torch.device(device), SIZES[size], folder)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def gpu_only(self, what: str) -> bool:
        """Returns whether this device is a GPU, and otherwise records that `what` was not run."""
        if not self.on_gpu:
            self.not_run.add(what)
        return self.on_gpu

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 10, warmup: int = 3) -> float:
        """Returns the median seconds of a call, each from an idle device until its last kernel ends."""
        times = []
        for number in range(warmup + repeats):
            self.synchronize()
            began = time.perf_counter()
            work()
            self.synchronize()
            if number >= warmup:
                times.append(time.perf_counter() - began)
        return median(times)

    def mean_seconds(self, work: Callable[[], object], repeats: int, warmup: int = 3) -> float:
        """Returns the mean seconds of a call in a row of calls, in which the host may run ahead of the device."""
        for _ in range(warmup):
            work()
        self.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        self.synchronize()
        return (time.perf_counter() - began) / repeats

    def peak(self) -> int | None:
        """Returns the largest number of bytes allocated on the GPU since `forget_peak`."""
        return torch.cuda.max_memory_allocated() if self.gpu_only("peak memory") else None

    def forget_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def earlier(self, stage: str) -> Line:
        """Returns the line of a stage that has run already, also in another process; {} without one."""
        file = self.folder / RESULTS
        lines = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
        return next((line for line in lines if line["stage"] == stage), {})


def load(where: str) -> Stage:
    """Returns the stage at module:name."""
    module, _, name = where.partition(":")
    stage: Stage = getattr(import_module(f"experiments.benchmark.gpu_stages.{module}"), name)
    return stage


def release(context: Context) -> None:
    """Frees the memory of a stage, so that the next one starts as in a new process.

    Raises an error of CUDA that the stage left, such as of an illegal address, after which only a new process works.
    """
    gc.collect()
    context.synchronize()
    if context.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def synchronisations() -> Iterator[list[str]]:
    """Fills the list, on leaving the context, with the places that waited for the GPU, by CUDA's warnings."""
    places: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield places
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    places += [f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits]


def attempt(work: Callable[[], float]) -> float | str:
    """Returns a measurement, or the error that prevented it."""
    try:
        return work()
    except (RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def filled(make: Callable[[], nn.Module], device: torch.device) -> Any:
    """Returns a network with random weights, also in the layers that start at zero, whose products would be faster."""
    with torch.device(device):
        network = make()
    for weight in network.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
