"""`ldm verify`: whether a cache of latents or a set of shards is whole."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from ldm.data.latents.cache import MANIFEST, read_manifest
from ldm.data.latents.verification import cache_problems, shard_problems
from ldm.data.sources.captions import Captions
from ldm.data.sources.shards import find_tars
from ldm.errors import UsageError
from ldm.progress import Progress, clear
from ldm.weights.parts import first_stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check a cache (manifest, counts, checksums, NaN) or shards (cut tars, missing and empty members, captions that"
        " cannot be read; pictures are not decoded). Prints a sentence for each problem; exit code 1 if there is one."
    )
    parser.add_argument("path", metavar="CACHE|SHARDS", help="what ldm encode wrote, or a tar, a pattern, a folder")
    parser.add_argument("--first-stage", metavar="FILE", help="the autoencoder that the cache must be of")
    parser.add_argument(
        "--captions",
        nargs="+",
        default=[],
        metavar="PLACE",
        help="where shards have their captions, as for ldm encode (default: txt, or else the caption in json)",
    )


def run(args: argparse.Namespace) -> None:
    """ValueError at the end if there are problems."""
    cache = Path(args.path)
    is_cache = (cache / MANIFEST).exists() or any(cache.glob("*.safetensors"))
    if is_cache and args.captions:
        raise UsageError(f"--captions is for shards, and {cache} is a cache of latents, which holds its own")
    if args.first_stage and not is_cache:
        raise UsageError(f"--first-stage is for a cache of latents, which {args.path} is not")
    if is_cache:
        wanted = first_stage(args.first_stage).source["fingerprint"] if args.first_stage else None
        total, checks, what = _shards(cache) + 1, cache_problems(cache, wanted), "files"
    else:
        tars = find_tars(args.path)
        total, checks, what = len(tars), shard_problems(tars, Captions(tuple(args.captions))), "shards"
    found = _tell(checks, Progress(total, what))
    if found:
        raise ValueError(f"{args.path} has {found} problem{'s' if found > 1 else ''}")
    print(f"{args.path}: {total} {what}, no problem found")


def _shards(cache: Path) -> int:
    try:
        return len(read_manifest(cache)["shards"])
    except (OSError, ValueError):  # which is told as a problem
        return 0


def _tell(checks: Iterator[tuple[str, list[str]]], progress: Progress) -> int:
    """Prints the problems as they are found; gives their number."""
    found = 0
    for _, problems in checks:
        if problems:
            clear()
            print("\n".join(problems), flush=True)
        found += len(problems)
        progress.step()
    return found
