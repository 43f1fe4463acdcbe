"""Defines the arguments of `ldm filter`."""

import argparse
import os
from dataclasses import fields
from pathlib import Path

from ldm.commands.filter.recipe import DEFAULT, path_of, presets
from ldm.metadata.columns import ALIASES
from ldm.metadata.rules import Thresholds

UNITS = {
    "min_aesthetic": "score, 1 to 10",
    "min_similarity": "cosine",
    "min_side": "pixels",
    "min_aspect": "width / height",
    "max_aspect": "width / height",
    "max_watermark": "probability; values equal to it are rejected",
    "nsfw": "label of the NSFW column",
    "max_unsafe": "probability; used if a file has no NSFW column",
    "language": "label of the LANGUAGE column, such as en",
    "min_caption": "code points",
    "max_caption": "code points",
    "caption_match": "regular expression (RE2) that must match",
    "caption_exclude": "regular expression (RE2) that must not match",
    "deduplicate": "true or false",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Keep the rows of metadata (parquet, csv, tsv, jsonl) that pass all rules, and report why the others were "
        "rejected. The output is parquet."
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IN",
        help="a file, folder or glob, or an address s3://, hf://datasets/, https:// …",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="F",
        help="folder for the shards; F.report.json and F.report.png are written beside it",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--preset",
        choices=presets(),
        default=DEFAULT,
        help="data set that the metadata is of, which sets its columns and the rules that they allow "
        f"(default: {DEFAULT}, for LAION-2B-en-aesthetic)",
    )
    source.add_argument(
        "--config", type=Path, metavar="F", help=f"file like that of a preset, such as {path_of(DEFAULT)}"
    )
    parser.add_argument("--header", metavar="NAMES", help="columns of a csv or tsv without a header row: url,caption")
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=COLUMN", help=f"NAME: {', '.join(ALIASES)}"
    )
    cuts = parser.add_argument_group("rules", "These options override the config file. The value none disables a rule.")
    for field in fields(Thresholds):
        option = "--" + field.name.replace("_", "-")
        cuts.add_argument(option, default=argparse.SUPPRESS, metavar="X", help=UNITS[field.name])
    _number(parser, "--rows-per-shard", int, 1_000_000, "maximum rows per shard; shards differ by at most one row")
    _number(parser, "--threads", int, min(os.cpu_count() or 1, 16), "threads")
    _number(parser, "--max-bad-share", float, 0.01, "share of unreadable rows that is tolerated, 0 to 1")
    parser.add_argument("--dry-run", action="store_true", help="predict from footers and a sample, write nothing")
    _number(parser, "--sample-rows", int, 200_000, "rows that --dry-run reads")
    _number(parser, "--size", int, 512, "pixels per side, for the prediction of --dry-run")
    _number(parser, "--alive", float, 0.75, "share of URLs that still answer, for the prediction of --dry-run")
    # 100 M URLs in 20 h on one machine, according to the README of img2dataset.
    _number(parser, "--pictures-per-second", float, 1389, "download speed, for the prediction of --dry-run")


def _number(parser: argparse.ArgumentParser, name: str, kind: type, default: float, unit: str) -> None:
    parser.add_argument(name, type=kind, default=default, metavar="N", help=f"{unit} (default: %(default)s)")
