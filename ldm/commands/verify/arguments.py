"""Defines the arguments of `ldm verify`."""

import argparse

from ldm.commands.captions_argument import add_captions_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check a cache (manifest, counts, checksums, NaN) or shards (truncated tars, missing and empty members, "
        "unreadable captions; images are not decoded). Prints a sentence per problem; exits with 1 if there are any."
    )
    parser.add_argument(
        "path", metavar="CACHE|SHARDS", help="a cache written by ldm encode, or a tar, a pattern or a folder of tars"
    )
    parser.add_argument("--first-stage", metavar="FILE", help="the autoencoder that must have encoded the cache")
    text = "where to find captions in shards, as for ldm encode (default: txt, or else the caption in json)"
    add_captions_argument(parser, text)
