"""Compares `ldm filter` with a row-by-row implementation on random metadata files.

python -m experiments.robustness.filter.campaign --minutes 10 --json campaign.json
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
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
FOLDERS = ("a [v2]", "WIDTH=5", "aesthetic=5", "what?", "an apostrophe's")  # names that some readers interpret
RECIPE = Thresholds(6.5, 0.28, 512, 0.5, 2.0, 0.5, "UNLIKELY", 0.5, None, 20, 300, None, None, True)


@dataclass
class Trial:
    """The random files of a seed, and the arguments to filter them."""

    cuts: Thresholds
    has_nsfw: bool
    chosen: dict[str, str]
    paths: list[Path]
    rows: list[dict[str, Any]]


def prepare(rng: random.Random, folder: Path) -> Trial:
    """Writes random files into a new folder in `folder`."""
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
        count = rng.choice([paths[-1].suffix == ".jsonl", 1, 30, 300, 1500])  # a jsonl without rows has no columns
        rows += write(rng, paths[-1], count, names, len(rows), twins)
    return Trial(cuts, has_nsfw, names if twins else {}, paths, rows)


@dataclass(frozen=True)
class Outcome:
    """The number of filtered rows, the discrepancy if any, and whether the files were refused with a message."""

    rows: int
    wrong: str | None
    refused: bool = False


def trial(seed: int, folder: Path) -> Outcome:
    """Filters the random files of a seed and compares the result with the expected one."""
    given = prepare(random.Random(seed), folder)
    expected = expect(given.rows, given.cuts, given.has_nsfw)
    return Outcome(len(given.rows), _difference(expected, *_filtered(given, folder)))


def corrupt_trial(seed: int, folder: Path) -> Outcome:
    """Filters the files of a seed after changing bytes, and checks that the counts cover every row."""
    rng = random.Random(seed)
    given = prepare(rng, folder)
    for path in given.paths:
        path.write_bytes(corrupted(rng, path.read_bytes()))
    try:
        kept, work = _filtered(given, folder)
    except (ValueError, OSError) as error:
        return Outcome(len(given.rows), None if str(error) else "refused without a message", refused=True)
    rejected = sum(step["rejected"] for step in work.tally.steps(work.rules))
    complete = len(kept) + rejected == work.tally.rows
    wrong = f"{len(kept)} kept and {rejected} rejected are not all {work.tally.rows} rows"
    return Outcome(len(given.rows), None if complete else wrong)


def corrupted(rng: random.Random, data: bytes) -> bytes:
    """Returns the bytes truncated, partly zeroed, or changed anywhere or at the end, where parquet has its footer."""
    if not data or (kind := rng.random()) < 0.2:
        return data[: rng.randrange(len(data) + 1)]
    changed = bytearray(data)
    start = rng.randrange(len(data))
    if kind < 0.3:
        return data[:start] + bytes(100) + data[start + 100 :]
    first = 0 if kind < 0.6 else max(0, len(data) - rng.choice([12, 300, 3000]))
    for _ in range(rng.choice([1, 3, 20])):
        changed[rng.randrange(first, len(data))] = rng.randrange(256)
    return bytes(changed)


def _thresholds(rng: random.Random) -> Thresholds:
    """Returns a random recipe, in which some rules are disabled."""
    off = [name for name in ("min_aesthetic", "min_similarity", "min_side", "min_aspect", "max_aspect", "max_watermark",
                             "nsfw", "min_caption", "max_caption") if rng.random() < 0.15]  # fmt: skip
    language = rng.choice([None, "en"])
    return replace(RECIPE, **dict.fromkeys(off), language=language, deduplicate=rng.random() < 0.7)


def _filtered(given: Trial, folder: Path) -> tuple[list[int], Filter]:
    """Returns the hashes of the kept rows, which equal their positions."""
    work_folder = folder / "work"
    work_folder.mkdir()
    cuts = given.cuts
    sources, damaged = open_sources(find(map(str, given.paths)), work_folder)
    if not sources:
        raise ValueError(damaged[0].reason)
    active = rules(cuts, given.has_nsfw)
    groups = file_groups(sources, [name for rule in active for name in rule.columns], given.chosen)
    with database(work_folder, 2) as connection:
        work = Filter(connection, active, axes(cuts, active), cuts.deduplicate, work_folder, damaged=damaged)
        work.create_tables(groups)
        for group in groups:
            for batch in in_batches(group):
                work.add(batch)
        count = work.finish()
        work.write(work_folder / "kept.parquet", 0, count)
        table = pq.read_table(
            work_folder / "kept.parquet", columns=["url", "hash"] if "hash" in work.kinds else ["url"]
        )
        return [int(value) if str(value).isdigit() else -1 for value in table.columns[-1].to_pylist()], work


def _difference(expected: Expected, kept: list[int], work: Filter) -> str | None:
    """Returns a description of the difference, or None if there is none."""
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


def run(seeds: range, seconds: float, corrupt: bool) -> dict[str, Any]:
    """Runs trials of consecutive seeds until the time is over; returns the counts and the seeds with a difference."""
    start, counts, wrong = time.monotonic(), Counter[str](), {}
    for seed in seeds:
        if time.monotonic() - start > seconds:
            break
        with tempfile.TemporaryDirectory(prefix="ldm.") as folder:
            try:
                outcome = (corrupt_trial if corrupt else trial)(seed, Path(folder))
            except Exception as error:  # any error counts, because the row-by-row implementation raised none
                outcome = Outcome(0, f"{type(error).__name__}: {' '.join(str(error).split())}")
        counts.update(trials=1, rows=outcome.rows, refused=outcome.refused)
        if outcome.wrong:
            wrong[seed] = outcome.wrong
    return {
        "duckdb": duckdb.__version__,
        "pyarrow": pa.__version__,
        "corrupt": corrupt,
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
    parser.add_argument("--corrupt", action="store_true", help="change bytes of the files")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    result = run(range(args.seed, args.seed + args.trials), 60 * args.minutes, args.corrupt)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if result["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
