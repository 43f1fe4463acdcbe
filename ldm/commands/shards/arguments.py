"""Defines the arguments of `ldm shards`."""

import argparse
from pathlib import Path

from ldm.commands.captions_argument import PLACES, add_captions_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the images of a folder to shards for data=shards and ldm encode. Captions are read from files beside "
        "the images (.txt, .json, .caption), metadata.jsonl, .csv or .parquet (Hugging Face's imagefolder), COCO's "
        "annotations, the names of kohya's folders (10_sks dog), or .parquet files that contain the images "
        "themselves. Images are stored as they are. What is left out is counted by reason."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of the images, or of .parquet files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for shard-00000.tar, …")
    parser.add_argument(
        "--caption", metavar="TEXT", help="the caption of images that have none (default: leave them out)"
    )
    defaults = "txt, or else json, or else caption; the columns caption, captions or text"
    add_captions_argument(parser, f"{PLACES}, which is also a column of a table (default: {defaults})")
    parser.add_argument(
        "--shard-size", type=int, default=1000, metavar="N", help="images per tar (default: %(default)s)"
    )
