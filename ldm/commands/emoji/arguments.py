"""Defines the arguments of `ldm emoji`."""

import argparse
from pathlib import Path

FAMILY = "emoji-datasource"
HOW_TO_GET = f"get it with `npm pack {FAMILY}-google@16.0.0`, or -twitter, -facebook, -apple"
NATIVE_SIZE = 64  # pixels per side of the images in the package


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"Create an emoji data set from an npm package of the {FAMILY} family; {HOW_TO_GET}. Only Google's images "
        "(Apache 2.0) and Twitter's (CC BY 4.0) have a free licence."
    )
    parser.add_argument("source", type=Path, help="the package: the .tgz or its unpacked folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for emoji-00000.tar, …")
    parser.add_argument(
        "--images", metavar="SET", help=f"google, twitter, …: only for the package {FAMILY}, which has several sets"
    )
    for name, action in (("--include", "only"), ("--exclude", "without")):
        parser.add_argument(
            name, nargs="+", metavar="NAME", default=[], help=f"{action} these categories or subcategories"
        )
    parser.add_argument(
        "--unicode-names",
        action="store_true",
        help='captions are the official names, such as "heavy black heart", also where an everyday name is known',
    )
    for name, default, unit in (
        ("--size", NATIVE_SIZE, "pixels per side"),
        ("--shard-size", 480, "samples per tar"),
    ):
        parser.add_argument(name, type=_positive, default=default, metavar="N", help=f"{unit} (default: %(default)s)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
