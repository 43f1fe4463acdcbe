"""`ldm verify`: checks a cache of latents or a set of shards for problems."""

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


def run(args: argparse.Namespace) -> None:
    """Prints all problems. Raises ValueError at the end if there are any."""
    cache = Path(args.path)
    is_cache = (cache / MANIFEST).exists() or any(cache.glob("*.safetensors"))
    if is_cache and args.captions:
        raise UsageError(f"--captions is for shards, but {cache} is a cache of latents: remove --captions")
    if args.first_stage and not is_cache:
        raise UsageError(f"--first-stage is for a cache of latents, but {args.path} is not one: remove --first-stage")
    if is_cache:
        expected = first_stage(args.first_stage).source["fingerprint"] if args.first_stage else None
        total, checks, unit = _shards(cache) + 1, cache_problems(cache, expected), "files"
    else:
        tars = find_tars(args.path)
        total, checks, unit = len(tars), shard_problems(tars, Captions(tuple(args.captions))), "shards"
    found = _print_problems(checks, Progress(total, unit))
    if found:
        raise ValueError(f"{args.path} has {found} problem{'s' if found > 1 else ''}")
    print(f"{args.path}: {total} {unit}, no problem found")


def _shards(cache: Path) -> int:
    try:
        return len(read_manifest(cache)["shards"])
    except (OSError, ValueError):  # cache_problems reports these
        return 0


def _print_problems(checks: Iterator[tuple[str, list[str]]], progress: Progress) -> int:
    """Prints the problems as they are found and returns their number."""
    found = 0
    for _, problems in checks:
        if problems:
            clear()
            print("\n".join(problems), flush=True)
        found += len(problems)
        progress.step()
    return found
