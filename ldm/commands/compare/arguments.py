"""Defines the arguments of `ldm compare`."""

import argparse
from pathlib import Path

from ldm.metrics.sample_sizes import MIN_IMAGES, MIN_SEEDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare runs: means over seeds with 95 % intervals, differences with p-values, curves, and images of the same "
        "prompt and noise side by side. Runs that differ only in their seed form one group; values that were measured "
        "differently are marked and never averaged, and no difference is claimed below "
        f"{MIN_SEEDS} seeds per group and {MIN_IMAGES} images. Writes report.html (self-contained, readable offline), "
        "report.md and report.json. Overwrites the files of an earlier comparison, unless they were changed since."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a JSON file of `ldm evaluate`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="also write all plots to this folder as SVG and PDF"
    )
