"""`ldm bench`: measures something next to its peers. It runs from the checkout, where the studies are."""

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
    "checkpoint": ("experiments.benchmark.checkpoint", "how long training waits for a checkpoint, and for its write"),
    "encode": ("experiments.benchmark.encode", "the whole of `ldm encode`, beside the encoder alone"),
    "faults": ("experiments.benchmark.faults", "runs killed over and over, beside the run that never was"),
    "fid": ("experiments.benchmark.fid", "the Fréchet distance at 2,048 features, beside scipy's sqrtm"),
    "filter": ("experiments.benchmark.filter", "`ldm filter` on 10 M rows, beside pandas and bare reading"),
    "generate": ("experiments.benchmark.generate", "drawing with Stable Diffusion 1.5 at 512x512, beside diffusers"),
    "layouts": ("experiments.layouts.measure", "loss curves of one training, split over ranks in several ways"),
    "load": ("experiments.benchmark.load", "loading Stable Diffusion's weights, beside diffusers and safetensors"),
    "loader": ("experiments.benchmark.loader", "cached latents and pictures a second, next to webdataset"),
    "train": ("experiments.benchmark.train", "a training step by the Trainer, beside loops written by hand"),
    "scale": ("experiments.benchmark.scale", "opening and reading 10 to 100,000 shards"),
    "solvers": ("experiments.solvers.measure", "samplers' errors against exact answers, and what a step costs"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    listing = "\n".join(f"  {name:<10} {text}" for name, (_, text) in BENCHES.items())
    parser.description = f"Measure, and write the numbers as JSON.\n\nnames:\n{listing}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=BENCHES, metavar="NAME", help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go (default: printed)")
    parser.add_argument("--kills", type=int, metavar="N", help="of faults: how often to kill (50)")


def run(args: argparse.Namespace) -> None:
    module, _ = BENCHES[args.name]
    if not (CHECKOUT / "experiments").is_dir():
        raise FileNotFoundError(
            f"ldm bench needs the folder experiments/, which {CHECKOUT} does not hold: run it from a checkout"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    if args.kills is not None and (args.name != "faults" or args.kills < 1):
        raise UsageError(f"--kills is for `ldm bench faults`, and 1 or more, not {args.kills} for {args.name}")
    if args.json is not None:
        check_replaceable(args.json, args.name)
    numbers = import_module(module).measure(*([] if args.kills is None else [args.kills]))
    if args.json is None:
        return print(json.dumps(numbers, indent=2))
    save(args.json, args.name, numbers)
    print(args.json)


def check_replaceable(path: Path, name: str) -> None:
    """Raises FileExistsError for a file other than the numbers of this benchmark, and OSError where none can be."""
    check_writable(path.parent)
    if path.exists() and not _is_of(path, name):
        refuse([path], f"ldm bench {name}", "move it away, or give another --json")


def _is_of(path: Path, name: str) -> bool:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and held.get("bench") == name


def save(path: Path, name: str, numbers: dict[str, Any]) -> None:
    """The numbers, with the benchmark's name, so that the same command may replace them."""
    write_json(path, {"bench": name} | numbers)
