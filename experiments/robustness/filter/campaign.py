"""Compares `ldm filter` with a row-by-row implementation on random metadata files.

python -m experiments.robustness.filter.campaign --minutes 10 --json campaign.json
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.robustness.filter.files import NAMES, write
from experiments.robustness.filter.row_by_row import Expected, expect
from ldm.metadata.filtering import Filter, database, file_groups, in_batches
from ldm.metadata.funnel import axes
from ldm.metadata.rules import Thresholds, rules
from ldm.metadata.tables import find, open_sources

SUFFIXES = (*[".parquet"] * 7, ".csv", ".tsv", ".jsonl")
FOLDERS = ("a [v2]", "WIDTH=5", "aesthetic=5", "what?", "an apostrophe's")  # names that mean more to some readers
RECIPE = Thresholds(6.5, 0.28, 512, 0.5, 2.0, 0.5, "UNLIKELY", 0.5, None, 20, 300, None, None, True)


def trial(seed: int, folder: Path) -> tuple[int, str | None]:
    """Filters the random files of a seed; returns the number of rows and the difference from what is expected."""
    rng = random.Random(seed)
    cuts = _thresholds(rng)
    has_nsfw = cuts.nsfw is not None and rng.random() < 0.5
    optional = {"nsfw": has_nsfw, "language": cuts.language is not None or rng.random() < 0.3}
    rows: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    paths: list[Path] = []
    source = folder / rng.choice(FOLDERS)
    source.mkdir()
    twins = rng.random() < 0.2
    for i in range(rng.choice([1, 1, 2, 4])):
        if not names or (not twins and rng.random() < 0.3):
            names = {name: rng.choice(spellings) for name, spellings in NAMES.items() if optional.get(name, True)}
        paths.append(source / f"{i}{rng.choice(SUFFIXES)}")
        rows += write(
            rng, paths[-1], rng.choice([paths[-1].suffix == ".jsonl", 1, 30, 300, 1500]), names, len(rows), twins
        )
    chosen = names if twins else {}
    expected = expect(rows, cuts, has_nsfw)
    return len(rows), _difference(expected, *_filtered(paths, chosen, folder, cuts, has_nsfw))


def _thresholds(rng: random.Random) -> Thresholds:
    """Returns the recipe with some rules off."""
    off = [name for name in ("min_aesthetic", "min_similarity", "min_side", "min_aspect", "max_aspect", "max_watermark",
                             "nsfw", "min_caption", "max_caption") if rng.random() < 0.15]  # fmt: skip
    language = rng.choice([None, "en"])
    return replace(RECIPE, **dict.fromkeys(off), language=language, deduplicate=rng.random() < 0.7)


def _filtered(
    paths: list[Path], chosen: dict[str, str], folder: Path, cuts: Thresholds, has_nsfw: bool
) -> tuple[list[int], Filter]:
    work_folder = folder / "work"
    work_folder.mkdir()
    sources, damaged = open_sources(find(map(str, paths)), work_folder)
    active = rules(cuts, has_nsfw)
    groups = file_groups(sources, [name for rule in active for name in rule.columns], chosen)
    with database(work_folder, 2) as connection:
        work = Filter(connection, active, axes(cuts, active), cuts.deduplicate, work_folder, damaged=damaged)
        work.create_tables(groups)
        for group in groups:
            for batch in in_batches(group):
                work.add(batch)
        count = work.finish()
        work.write(work_folder / "kept.parquet", 0, count)
        return [int(i) for i in pq.read_table(work_folder / "kept.parquet")["hash"].to_pylist()], work


def _difference(expected: Expected, kept: list[int], work: Filter) -> str | None:
    """Returns what differs, None if nothing does."""
    tally = work.tally
    if work.damaged:
        return f"unreadable: {work.damaged[0]}"
    rejected = {step["reason"]: step["rejected"] for step in tally.steps(work.rules) if step["rejected"]}
    pairs: dict[str, tuple[Any, Any]] = {
        "rejected": (dict(expected.rejected), rejected),
        "kept": (expected.kept, kept),
    }
    for name in expected.nulls:
        pairs[f"nulls of {name}"] = expected.nulls[name], tally.nulls[name]
        pairs[f"uncoercible {name}"] = expected.uncoercible[name], tally.uncoercible[name]
    return next(
        (f"{what}: expected {one}, found {other}" for what, (one, other) in pairs.items() if one != other), None
    )


def run(seeds: range, seconds: float) -> dict[str, Any]:
    """Runs the trials of the seeds until the time is over; returns counts and the seeds that differ."""
    start, counts, wrong = time.monotonic(), Counter[str](), {}
    for seed in seeds:
        if time.monotonic() - start > seconds:
            break
        with tempfile.TemporaryDirectory(prefix="ldm.") as folder:
            try:
                rows, difference = trial(seed, Path(folder))
            except Exception as error:  # whatever it is, the row-by-row implementation did not raise it
                rows, difference = 0, f"{type(error).__name__}: {' '.join(str(error).split())}"
        counts.update(trials=1, rows=rows)
        if difference:
            wrong[seed] = difference
    return {
        "duckdb": duckdb.__version__,
        "pyarrow": pa.__version__,
        "first_seed": seeds.start,
        **counts,
        "wrong": wrong,
        "seconds": time.monotonic() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--trials", type=int, default=10**9, help="maximum number of trials")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    result = run(range(args.seed, args.seed + args.trials), 60 * args.minutes)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if result["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
