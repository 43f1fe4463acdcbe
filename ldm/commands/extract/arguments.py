"""Defines the arguments of `ldm extract`."""

import argparse
from pathlib import Path

from ldm.adapters.presets import PRESETS
from ldm.weights.adapters.layouts import LAYOUTS
from ldm.weights.recognise import READABLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a LoRA from the difference of two models of the same architecture, with the best approximation of every "
        "layer's change for the rank. The remaining difference is printed."
    )
    parser.add_argument("base", metavar="BASE", help=f"the model to change: {READABLE}")
    parser.add_argument("tuned", metavar="TUNED", help="the model that BASE with the LoRA should reproduce")
    parser.add_argument(
        "--rank", type=int, required=True, help="the rank of every layer, limited by the size of the layer"
    )
    parser.add_argument("--targets", choices=PRESETS, default="all", help="the layers to change (default: all)")
    parser.add_argument("--to", choices=LAYOUTS, default="kohya", help="the layout of the file (default: kohya)")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that ldm wrote at this path")
