"""Defines the arguments of `ldm ema`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reconstruct averages of a run's weights over any fraction of its training, as if they had been tracked, "
        "from the snapshots of ema=power. Each is a model: python sample.py model=RUN/ema_0.070.safetensors"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run trained with ema=power")
    parser.add_argument(
        "--length",
        required=True,
        metavar="L,L,…",
        help="standard deviations of the averages, as fractions of training between 0 and 0.288",
    )
    parser.add_argument("--step", type=int, metavar="N", help="last step of the averages (default: the last snapshot)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write the models to (default: RUN)")
