"""`ldm bench`: measures something next to its peers. It runs from the checkout, where the studies are."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from ldm.files import write_json

CHECKOUT = Path(__file__).parents[2]
BENCHES = {
    "fid": ("experiments.benchmark.fid", "the Fréchet distance at 2,048 features, beside scipy's sqrtm"),
    "filter": ("experiments.benchmark.filter", "`ldm filter` on 10 M rows, beside pandas and bare reading"),
    "load": ("experiments.benchmark.load", "loading Stable Diffusion's weights, beside diffusers and safetensors"),
    "loader": ("experiments.benchmark.loader", "cached latents a second, next to webdataset"),
    "solvers": ("experiments.solvers.measure", "samplers' errors against exact answers, and what a step costs"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    listing = "\n".join(f"  {name:<10} {text}" for name, (_, text) in BENCHES.items())
    parser.description = f"Measure, and write the numbers as JSON.\n\nnames:\n{listing}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=BENCHES, metavar="NAME", help="what to measure")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE", help="where the numbers go")


def run(args: argparse.Namespace) -> None:
    module, _ = BENCHES[args.name]
    if not (CHECKOUT / "experiments").is_dir():
        raise FileNotFoundError(
            f"ldm bench needs the folder experiments/, which {CHECKOUT} does not hold: run it from a checkout"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    write_json(args.json, import_module(module).measure())
    print(args.json)
