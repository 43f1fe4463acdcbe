"""Implements `ldm bench`, which runs a benchmark from the checkout, where experiments/ is."""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ldm.errors import UsageError
from ldm.files import check_writable, write_json
from ldm.ownership import refuse

CHECKOUT = Path(__file__).parents[2]
BENCHES = {
    "checkpoint": ("experiments.benchmark.checkpoint", "how long training waits for a checkpoint and its write"),
    "encode": ("experiments.benchmark.encode", "`ldm encode` compared with the encoder alone"),
    "faults": ("experiments.benchmark.faults", "runs killed repeatedly, compared with an uninterrupted run"),
    "fid": ("experiments.benchmark.fid", "the Fréchet distance at 2,048 features, compared with scipy's sqrtm"),
    "filter": ("experiments.benchmark.filter", "`ldm filter` on 10 M rows, compared with pandas and plain reading"),
    "generate": (
        "experiments.benchmark.generate",
        "sampling from Stable Diffusion 1.5 at 512x512, compared with diffusers",
    ),
    "layouts": ("experiments.layouts.measure", "loss curves of one training run, split over ranks in several ways"),
    "load": (
        "experiments.benchmark.load",
        "loading Stable Diffusion's weights, compared with diffusers and safetensors",
    ),
    "loader": ("experiments.benchmark.loader", "cached latents and images per second, compared with webdataset"),
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


def run(args: argparse.Namespace) -> None:
    module, _ = BENCHES[args.name]
    if not (CHECKOUT / "experiments").is_dir():
        raise FileNotFoundError(
            f"ldm bench needs the folder experiments/, which {CHECKOUT} does not contain: run it from a checkout"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    if args.kills is not None and (args.name != "faults" or args.kills < 1):
        raise UsageError(
            f"--kills {args.kills} was given for {args.name}, but is only for `ldm bench faults`, and at least 1"
        )
    if args.json is not None:
        check_replaceable(args.json, args.name)
    numbers = import_module(module).measure(*([] if args.kills is None else [args.kills]))
    if args.json is None:
        return print(json.dumps(numbers, indent=2))
    save(args.json, args.name, numbers)
    print(args.json)


def check_replaceable(path: Path, name: str) -> None:
    """Raises FileExistsError if the file is not a result of this benchmark, OSError if it cannot be written."""
    check_writable(path.parent)
    if path.exists() and not _holds_benchmark(path, name):
        refuse([path], f"ldm bench {name}", "move it away, or give another --json")


def _holds_benchmark(path: Path, name: str) -> bool:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and held.get("bench") == name


def save(path: Path, name: str, numbers: dict[str, Any]) -> None:
    """Writes the numbers with the benchmark's name, so that the same command may replace them."""
    write_json(path, {"bench": name} | numbers)
