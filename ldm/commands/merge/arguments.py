"""Defines the arguments of `ldm merge`."""

import argparse
from pathlib import Path

from ldm.weights.formats import FORMATS
from ldm.weights.recognise import READABLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Merge LoRA, DoRA, LoHa or LoKr adapters into the weights of a model in float32, and write the model in its "
        "own dtypes."
    )
    parser.add_argument("model", metavar="MODEL", help=READABLE)
    parser.add_argument(
        "adapters",
        metavar="LORA[:WEIGHT]",
        nargs="+",
        help="a file of kohya, diffusers, peft, LyCORIS or ldm, or the folder of a run; the weight is 1 by default, "
        "and a negative weight subtracts",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="a .safetensors or .ckpt file, or a folder if there is no suffix"
    )
    parser.add_argument("--to", choices=FORMATS, help="the format (default: single for a file, diffusers for a folder)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="the dtype of the weights (default: as in the model; 16 bits may round small changes away)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a previous conversion at this path")
