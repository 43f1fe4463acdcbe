"""Defines the arguments of `ldm download`."""

import argparse
import sys
from pathlib import Path

from ldm.files import cache_home
from ldm.metadata.img2dataset import DISTRIBUTORS, REQUIREMENT

NUMBERS = (
    ("processes", int, 16, "processes"),
    ("threads", int, 64, "threads per process"),
    ("size", int, 512, "pixels of the shorter side; larger images are scaled down to it"),
    ("min_side", int, 0, "pixels; images with a shorter side are skipped"),
    ("shard_size", int, 10_000, "URLs per tar"),
    ("timeout", int, 10, "seconds to wait for a response"),
    ("deadline", float, 60, "seconds for a complete image"),
    ("max_bytes", int, 64 << 20, "maximum bytes of an image file"),
    ("max_pixels", int, 100_000_000, "maximum pixels of an image"),
    ("retries", int, 0, "additional attempts after a failure"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"Download the images of filtered metadata into tars, with {REQUIREMENT} in its own environment. "
        "An interrupted command resumes when it is run again."
    )
    parser.add_argument("source", metavar="IN", help="a parquet file or a folder of them, as ldm filter writes")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for 00000.tar, …")
    default = cache_home() / REQUIREMENT.replace("==", "-")
    parser.add_argument(
        "--env", type=Path, default=default, metavar="DIR", help="folder of the environment (default: %(default)s)"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="Python below 3.13 that creates the environment (default: this one)"
    )
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=COLUMN", help="NAME: url or caption, as for ldm filter"
    )
    parser.add_argument(
        "--distributor",
        choices=DISTRIBUTORS,
        default="multiprocessing",
        help="what runs the processes: this machine, or the cluster at RAY_ADDRESS or of Spark's configuration, whose "
        "workers need --out, --env and their Python at the same paths (default: %(default)s)",
    )
    for name, kind, value, unit in NUMBERS:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=kind, default=value, metavar="N", help=f"{unit} (default: %(default)s)")
