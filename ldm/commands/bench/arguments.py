"""Defines the arguments of `ldm bench`."""

import argparse
from pathlib import Path

BENCHES = {
    "checkpoint": ("experiments.benchmark.checkpoint", "how long training waits for a checkpoint and its write"),
    "encode": ("experiments.benchmark.encode", "`ldm encode` compared with the encoder alone"),
    "faults": ("experiments.benchmark.faults", "runs killed repeatedly, compared with an uninterrupted run"),
    "fid": ("experiments.benchmark.fid", "the Fréchet distance at 2,048 features, compared with scipy's sqrtm"),
    "filter": ("experiments.benchmark.filter", "`ldm filter` on 10 M rows, compared with pandas and plain reading"),
    "finetune": (
        "experiments.benchmark.finetune",
        "a training step of Stable Diffusion 1.5, compared with diffusers' script (20 GB)",
    ),
    "generate": (
        "experiments.benchmark.generate",
        "sampling from Stable Diffusion 1.5 at 512x512, compared with diffusers, also compiled (half an hour)",
    ),
    "layouts": ("experiments.layouts.measure", "loss curves of one training run, split over ranks in several ways"),
    "load": (
        "experiments.benchmark.load",
        "loading Stable Diffusion's weights, compared with diffusers and safetensors",
    ),
    "loader": ("experiments.benchmark.loader", "cached latents and images per second, compared with webdataset"),
    "packing": ("experiments.benchmark.packing", "what packed and folded weights save on the CPU, layer by layer"),
    "step": (
        "experiments.benchmark.step",
        "the parts of a step of the default run, and their share of the machine's peak",
    ),
    "train": ("experiments.benchmark.train", "a training step by the Trainer, compared with hand-written loops"),
    "scale": ("experiments.benchmark.scale", "opening and reading 10 to 100,000 shards"),
    "solvers": ("experiments.solvers.measure", "samplers' errors against exact solutions, and the cost of a step"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    listing = "\n".join(f"  {name:<10} {text}" for name, (_, text) in BENCHES.items())
    parser.description = f"Run a benchmark and write its numbers as JSON.\n\nnames:\n{listing}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=BENCHES, metavar="NAME", help="the benchmark to run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the numbers to (default: print them)")
    parser.add_argument("--kills", type=int, metavar="N", help="number of kills, for faults only (50)")
