"""`ldm convert` converts weights between ldm's own format and those of other tools."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ldm.errors import UsageError, warnings_on_stderr
from ldm.progress import Progress
from ldm.weights.adapters.convert import convert_adapter, convert_embedding
from ldm.weights.adapters.layouts import KOHYA, LAYOUTS
from ldm.weights.adapters.recognise import has_adapter, has_embedding
from ldm.weights.compvis.reader import ReadOptions
from ldm.weights.contents import Contents, open_contents
from ldm.weights.convert import part, verified, with_frozen_parts, write
from ldm.weights.destination import check_apart, sources_of
from ldm.weights.formats import format_of
from ldm.weights.recognise import DEFAULT

UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def run(args: argparse.Namespace) -> None:
    if (convert := _converter(args.source)) is not None:
        _check_layout(args)
        dtype = getattr(torch, args.dtype) if args.dtype else None
        print(convert(args.source, args.destination, args.to, dtype, args.overwrite))
        return
    if args.to == KOHYA:
        raise UsageError(f"--to {KOHYA} is for adapters and textual inversions, but {args.source} is none")
    shard, to = None if args.shard is None else size_of(args.shard), args.to or format_of(args.destination)
    contents = with_frozen_parts(open_contents(args.source, ReadOptions(not args.raw, args.prediction), args.variant))
    _check_used(args, to, contents)
    given = [] if args.source == DEFAULT else [Path(args.source).expanduser()]
    check_apart(args.destination, [*given, *sources_of(contents)])
    if args.part:
        contents = part(contents, args.part)
    for note in contents.notes:
        print(note, file=sys.stderr)
    progress = Progress(sum(len(network.tensors) for network in contents.networks.values()), "tensors")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    with warnings_on_stderr():
        write(verified(contents, dtype, progress.step), args.destination, to, shard, args.overwrite)
    print(args.destination)


def _converter(source: str) -> Callable[..., Path] | None:
    """Returns the function that converts an adapter or a textual inversion, or None for a model."""
    if has_adapter(source):
        return convert_adapter
    return convert_embedding if has_embedding(source) else None


def _check_layout(args: argparse.Namespace) -> None:
    """Raises UsageError for an option that applies only to models."""
    given = {"--part": args.part, "--shard": args.shard, "--raw": args.raw, "--prediction": args.prediction}
    given |= {"--variant": args.variant, f"--to {args.to}": args.to not in (None, *LAYOUTS)}
    if unused := [name for name, value in given.items() if value]:
        raise UsageError(
            f"{args.source} is no model but is added to one, to which {unused[0]} does not apply: leave it out"
        )


def _check_used(args: argparse.Namespace, to: str, contents: Contents) -> None:
    """Raises UsageError for an option that would have no effect."""
    if args.shard and to != "diffusers":
        raise UsageError(f"--shard splits the files of a diffusers folder, but the format is {to}; omit --shard")
    if args.variant and not Path(args.source).expanduser().is_dir():
        raise UsageError(f"--variant selects files of a diffusers folder, but {args.source} is not one; omit --variant")
    if args.prediction and contents.model.get("prediction") != args.prediction:
        raise UsageError(
            f"--prediction is for single files of Stable Diffusion, but {args.source} is {contents.description}; "
            "omit --prediction"
        )


def size_of(text: str) -> int:
    """Returns the bytes of "500MB", "2GB" or "1GiB". Raises UsageError for any other text."""
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in UNITS or int(match[1]) == 0:
        raise UsageError(f"--shard is {text!r}, but must be a size such as 500MB or 2GB")
    return int(match[1]) * UNITS[match[2].upper()]
