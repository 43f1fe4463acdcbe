"""Reports the cost of a training run, computed on the meta device without data, weights or training."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from ldm.nn.backbone import Backbone, trainable
from ldm.planning.flops import Cost, measure, measure_training
from ldm.planning.memory import checkpoint_copy, memory, workspaces
from ldm.planning.networks import PlannedNetwork, has_text_states, plan_networks
from ldm.planning.numbers import amount, count, duration, row
from ldm.planning.settings import AUTOCAST, compute_dtype, count_gpus, is_sharded, kind_of_product, precision_of
from ldm.planning.training_flops import PEAKS, teraflops

# Name, memory in GiB, and peaks.
GPUS = (
    ("A100 40 GB", 40, PEAKS["A100"]),
    ("A100 80 GB", 80, PEAKS["A100"]),
    ("H100 SXM", 80, PEAKS["H100 HBM3"]),
    ("H200", 141, PEAKS["H200"]),
    ("L4", 24, PEAKS["L4"]),
    ("RTX 4090", 24, PEAKS["RTX 4090"]),
)
UTILIZATION = 0.4  # assumed fraction of the peak
# The share of a UNet's activations that torch.compile keeps: 0.77 of 1.16 GiB for an image of Stable Diffusion 1.5 at
# 512 px, by the graphs that it makes (experiments/benchmark/activations.py), not by a GPU.
COMPILED = 0.66
USABLE = 0.9  # fraction of a GPU's memory; the rest is for CUDA, workspaces and fragmentation
CAPTION_BYTES = 100  # assumed
FLOP = "FLOP"


def print_plan(config: dict[str, Any]) -> None:
    """Prints what training with this resolved config costs: parameters, FLOPs, memory, cache and time."""
    for line in plan(config):
        print(line)


def plan(config: dict[str, Any]) -> Iterator[str]:
    """Yields the lines that `print_plan` prints."""
    trainer, batch = config["trainer"], config["data"]["batch_size"]
    networks, notes = plan_networks(config)
    trained, others = networks[0], [planned.network for planned in networks[1:]]
    gpus, sharded = count_gpus(trainer), is_sharded(trainer)
    held, other = (memory(config, trained.network, others, gpus, fsdp) for fsdp in (sharded, not sharded))
    costs = costs_of_a_batch(config, networks)
    held["activations"] = other["activations"] = sum(cost.saved for cost in costs.values())
    need = sum(held.values())
    images = config["data"]["global_batch"] or batch * gpus
    flops = sum(cost.forward + cost.backward for cost in costs.values()) * images // batch

    yield "parameters"
    for planned in networks:
        yield row(planned.name, amount(sum(p.numel() for p in planned.network.parameters())), planned.note)
    yield f"computation for a batch of {batch} on one GPU, in floating-point operations"
    yield from flop_rows(costs)
    images_note = f"{images} images on {count(gpus, 'GPU')}, {amount(flops // images, unit=FLOP)} each"
    yield row("a step", amount(flops, unit=FLOP), images_note)
    names = ("ddp", "fsdp") if not sharded else ("fsdp", "ddp")
    yield f"memory per GPU (strategy {names[0]}, precision {precision_of(config)}, batch {batch})"
    for name, size in (held | {"all": need}).items():
        yield row(name, amount(size, 1024, "B"))
    if isinstance(trained.network, Backbone) and trained.name == "unet" and not trained.network.checkpointing:
        less = f"with training.compile: about {COMPILED} of the UNet's, as in the graphs of Stable Diffusion 1.5"
        spared = (1 - COMPILED) * costs[trained.name].saved
        yield row("activations, compiled", amount(held["activations"] - spared, 1024, "B"), less)
    copied = "a copy of weights, optimizer and EMA, while a checkpoint is written"
    yield row("pinned, on the CPU", amount(checkpoint_copy(held), 1024, "B"), copied)
    assumed = "of cuBLAS and cuDNN, in addition: assumed"
    yield row("workspaces", amount(workspaces(trained.network), 1024, "B"), assumed)
    if gpus > 1:
        yield row(f"all, strategy {names[1]}", amount(sum(other.values()), 1024, "B"))
    yield "  assumes that all of it is held at once: an upper bound, because gradients grow while activations are freed"
    yield from cache_rows(trained, has_text_states(config))
    yield from time_rows(config, flops, need, held["activations"] / batch, gpus)
    yield from notes


def costs_of_a_batch(config: dict[str, Any], networks: list[PlannedNetwork]) -> dict[str, Cost]:
    """Returns the costs of the networks that a step calls, by name, the first of which is the trained one."""
    trained, low = networks[0], AUTOCAST.get(config["trainer"]["precision"])
    trained.network.to(compute_dtype(config))  # the dtype of gathered weights
    return {
        planned.name: measure_training(planned.network, planned.forward, low)
        if planned is trained or trainable(planned.network)
        else measure(planned.forward, low, grad=False)
        for planned in networks
        if planned.forward
    }


def flop_rows(costs: dict[str, Cost]) -> Iterator[str]:
    for name, cost in costs.items():
        yield row(f"{name}, forward", amount(cost.forward, unit=FLOP))
        if cost.backward:
            yield row(f"{name}, backward", amount(cost.backward, unit=FLOP))


def cache_rows(trained: PlannedNetwork, states: bool) -> Iterator[str]:
    """Yields the size per sample written by `ldm encode`: moments in float16, a caption, and text states if any."""
    if isinstance(trained.network, Backbone) and isinstance(trained.forward, partial):
        z, height, width = trained.forward.args[0].shape[1:]
        _, tokens, text_width = trained.forward.args[2].get("text").shape
        sample_bytes = 2 * (2 * z * height * width) + CAPTION_BYTES + states * 2 * tokens * text_width
        states_note = f", with text states {tokens}x{text_width} in float16" if states else ""
        moments = f"moments {2 * z}x{height}x{width} in float16"
        yield f"cache ({moments}; {CAPTION_BYTES} bytes of caption{states_note}, assumed)"
        yield row("a sample", amount(sample_bytes, 1024, "B"))
        yield row("a million", amount(sample_bytes * 10**6, 1024, "B"))


def time_rows(config: dict[str, Any], flops: int, need: int, image: float, gpus: int) -> Iterator[str]:
    """Yields the time of all steps and the largest batch size for each of `GPUS`; an image adds `image` bytes."""
    trainer, batch = config["trainer"], config["data"]["batch_size"]
    steps, kind = trainer["max_steps"], kind_of_product(config)
    yield f"time for {steps:,} steps on {count(gpus, 'GPU')}, at {UTILIZATION:.0%} (assumed) of the dense peak"
    for name, gib, peaks in GPUS:
        peak = teraflops(peaks, kind)
        seconds = flops * steps / (gpus * peak * 1e12 * UTILIZATION)
        largest = int((USABLE * gib * 2**30 - need) / image + batch)
        fits = f"fits a batch of up to {largest:,}" if largest > 0 else f"does not fit in {USABLE:.0%} of {gib} GiB"
        yield row(name, duration(seconds), f"{peak:.4g} TFLOP/s {kind}, {fits}")
    if trainer["devices"] in ("auto", "-1", -1):
        yield "trainer.devices=auto counts as one GPU per node; set trainer.devices=N for N GPUs"
