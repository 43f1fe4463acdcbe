"""Defines the arguments of `ldm info`."""

import argparse

from ldm.weights.recognise import READABLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Describe a model, a run or a cache of latents, without reading its tensors, or count the images and captions "
        "of shards."
    )
    parser.add_argument(
        "path",
        metavar="MODEL|RUN|CACHE|SHARDS",
        help=f"{READABLE}; also a standalone network, such as an autoencoder, a cache that ldm encode wrote, and a "
        "tar, a folder of tars or a pattern such as 'shards/*.tar'",
    )
