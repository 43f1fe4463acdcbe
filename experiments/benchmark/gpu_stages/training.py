"""Measures training: eager, compiled, as a CUDA graph, and of a LoRA; speed, memory and synchronisations."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from experiments.benchmark.gpu import Line
from experiments.benchmark.gpu_stages.context import Context, synchronisations
from experiments.benchmark.gpu_stages.step import Step, planned
from ldm.adapters.lora import LoRA
from ldm.device import ATTENTION, preferred_attention

PROFILED = 3  # steps
KERNELS = 30  # of a profile
LORA = {"rank": 16, "base_dtype": "bfloat16"}


def eager(context: Context) -> Iterator[Line]:
    """Yields the speed and memory of eager training, beside the plan, and its synchronisations."""
    plan = planned(context.size, context.size.batch)
    yield plan
    step = Step(context, context.size.batch)
    yield from speed(context, step, plan)
    yield {"synchronisations_of_a_step": waits(context, step)}


def compiled(context: Context) -> Iterator[Line]:
    """Yields the speed and memory of training with a compiled UNet; `profile` and `graph` use the same one."""
    yield from compiled_training(context, nullcontext)


def best(context: Context) -> Iterator[Line]:
    """Yields `compiled` with the attention backend that was fastest in `attention`, and with cudnn.benchmark."""
    backend = fastest_backend(context.earlier("attention"))
    torch.backends.cudnn.benchmark = True
    yield {"attention": backend, "cudnn_benchmark": True}
    yield from compiled_training(context, lambda: preferred_attention(backend))


def fastest_backend(line: Line) -> str:
    """Returns the backend with the least time for the attention shapes of a stage's line, of those that ran all."""
    shapes = [value["seconds"] for value in line.values() if isinstance(value, dict) and "flops" in value]
    names = [name for name in ATTENTION if shapes and all(isinstance(shape.get(name), float) for shape in shapes)]
    return min(names, key=lambda name: sum(shape[name] for shape in shapes), default="cudnn")


def compiled_training(context: Context, attention: Callable[[], AbstractContextManager[Any]]) -> Iterator[Line]:
    from ldm.planning.report import COMPILED

    batch = context.size.compiled_batch
    plan = planned(context.size, batch)
    plan["planned_bytes"]["activations"] = int(COMPILED * plan["planned_bytes"]["activations"])
    yield plan
    step = Step(context, batch)
    context.gpu_only("torch.compile")
    network: Any = torch.compile(step.unet, dynamic=False)
    step.use(network)
    with attention():
        began = time.perf_counter()
        step()
        context.synchronize()
        yield {"compile_seconds": time.perf_counter() - began}
        yield from speed(context, step, plan)
    context.shared["step"] = step


def speed(context: Context, step: Step, plan: Line) -> Iterator[Line]:
    """Yields images per second and peak memory, of steps that follow each other without synchronisation."""
    step()
    context.forget_peak()
    seconds = context.mean_seconds(step, context.size.steps, warmup=2)
    yield {"batch": step.batch, "seconds_per_step": seconds, "images_per_second": step.batch / seconds}
    if (peak := context.peak()) is not None:
        total = sum(plan["planned_bytes"].values())
        yield {"peak_bytes": peak, "reserved_bytes": torch.cuda.max_memory_reserved(), "peak_over_plan": peak / total}


def waits(context: Context, step: Callable[[], None]) -> list[str] | None:
    """Returns the places of a step that wait for the GPU."""
    if not context.gpu_only("counts of synchronisations"):
        step()
        return None
    with synchronisations() as places:
        step()
    return places


def profile(context: Context) -> Iterator[Line]:
    """Yields the kernels that take the most time in three compiled steps, and writes their trace."""
    step = context.shared["step"]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if context.gpu_only("a profile of kernels"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    context.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(PROFILED if context.on_gpu else 1):
            step()
        context.synchronize()
        wall = time.perf_counter() - began
    kernels = [event for event in profiler.key_averages() if is_kernel(event) == context.on_gpu]
    kernels.sort(key=own_microseconds, reverse=True)
    total = sum(map(own_microseconds, kernels))
    yield {"wall_seconds": wall, "kernel_seconds": total * 1e-6, "kernels": sum(event.count for event in kernels)}
    names = ("name", "calls", "share")
    rows = [(event.key[:120], event.count, own_microseconds(event) / max(total, 1e-9)) for event in kernels[:KERNELS]]
    yield {"by_kernel": [dict(zip(names, row, strict=True)) for row in rows]}
    profiler.export_chrome_trace(str(context.folder / "trace.json.gz"))
    yield {"trace": "trace.json.gz"}


def is_kernel(event: Any) -> bool:
    return event.device_type.name == "CUDA" and not event.is_user_annotation


def own_microseconds(event: Any) -> float:
    return float(event.self_device_time_total or event.self_cpu_time_total)


def graph(context: Context) -> Iterator[Line]:
    """Yields the speed of the complete compiled step as a CUDA graph."""
    step = context.shared.pop("step")
    context.forget_peak()
    step.optimize(capturable=context.on_gpu)
    replay = captured(context, step)
    seconds = context.mean_seconds(replay, context.size.steps, warmup=2)
    yield {"batch": step.batch, "seconds_per_step": seconds, "images_per_second": step.batch / seconds}
    finite = all(bool(weight.isfinite().all()) for weight in step.weights)
    yield {"finite": finite, "peak_bytes": context.peak()}


def captured(context: Context, work: Callable[[], object]) -> Callable[[], object]:
    """Returns a function that replays `work` as a CUDA graph, after warming up on another stream as torch requires.

    On a CPU it returns `work`.
    """
    if not context.gpu_only("CUDA graphs"):
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    found = torch.cuda.CUDAGraph()
    with torch.cuda.graph(found):
        work()
    return found.replay


def lora(context: Context) -> Iterator[Line]:
    """Yields the speed and memory of training a LoRA with one image a step, with and without checkpointing."""
    adapter = {"_target_": "ldm.adapters.lora.LoRA", **LORA}
    for checkpointing in (False, True):
        plan = planned(context.size, 1, adapter, checkpointing)
        step = Step(context, 1, LoRA(rank=16, base_dtype="bfloat16").adapt)
        step.unet.checkpointing = checkpointing
        parts = Line()
        for part in speed(context, step, plan):
            parts |= part
        name = "checkpointed" if checkpointing else "plain"
        yield {name: {**parts, **plan, "synchronisations_of_a_step": waits(context, step)}}
        del step
