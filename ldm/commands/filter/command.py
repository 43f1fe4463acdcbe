"""`ldm filter`: keeps the rows of metadata that pass all rules, and reports why the others were rejected."""

import argparse
import os
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.commands.filter.recipe import MAX_NUMBER, read, recognised
from ldm.errors import UsageError
from ldm.files import check_writable, temporary_folder
from ldm.metadata.columns import parse_choices
from ldm.metadata.rules import Thresholds, rules
from ldm.ownership import check_outside
from ldm.progress import Progress

if TYPE_CHECKING:
    from ldm.metadata.filtering import FileGroup, Filter
    from ldm.metadata.tables import Source

NEEDED = ("duckdb", "pyarrow", "matplotlib")
MAX_THREADS = 1024


def run(args: argparse.Namespace) -> None:
    """Writes shards and a report, or prints a prediction. Raises ValueError or OSError on failure."""
    _check(args)
    recipe = read(args)
    cuts, chosen = recipe.thresholds, recipe.columns | _usage(lambda: parse_choices(args.column))
    from ldm.commands.filter import report as filter_report
    from ldm.metadata.filtering import Filter, database
    from ldm.metadata.funnel import axes
    from ldm.metadata.tables import find, open_sources

    if not args.dry_run:
        filter_report.check_replaceable(args.out)
    start = time.monotonic()
    beside = args.out or Path(tempfile.gettempdir(), "ldm")
    with temporary_folder(beside) as folder, database(folder, args.threads) as connection:
        sources, damaged = open_sources(find(args.inputs), folder, recipe.header)
        if not sources:
            raise ValueError(f"none of the files is readable, for example {damaged[0].path}: {damaged[0].reason}")
        has_nsfw = cuts.nsfw is not None and all("nsfw" in g.columns for g in _groups(sources, [], chosen, args))
        if cuts.nsfw is not None and not has_nsfw and cuts.max_unsafe is None:
            raise ValueError(f"nsfw is {cuts.nsfw}, but a file has no NSFW column: give --max-unsafe, or --nsfw none")
        active_rules = rules(cuts, has_nsfw)
        groups = _groups(sources, [name for rule in active_rules for name in rule.columns], chosen, args)
        filter_report.print_columns(groups, cuts, has_nsfw)
        work = Filter(connection, active_rules, axes(cuts, active_rules), cuts.deduplicate, folder, damaged=damaged)
        _check_patterns(work, cuts)
        if args.dry_run:
            _predict(work, groups, args)
            return
        kept = _filter(work, groups)
        _check_damage(work, groups, args.max_bad_share)
        shards = write_shards(work, kept, args.rows_per_shard, folder / "kept")
        seconds = time.monotonic() - start
        report = filter_report.build(args.inputs, cuts, groups, work, has_nsfw, shards, seconds)
        _move(folder / "kept", args.out)
    filter_report.write(args.out, report)
    filter_report.print_summary(report, args.out)


def _groups(
    sources: "list[Source]", needed: list[str], chosen: dict[str, str], args: argparse.Namespace
) -> "list[FileGroup]":
    """Groups the files. If a column is missing, the ValueError names the preset of the data set that it recognises."""
    from ldm.metadata.filtering import file_groups

    try:
        return file_groups(sources, dict.fromkeys(needed), chosen)
    except ValueError as error:
        preset = recognised(sources[0].schema.names)
        if preset is None or preset == args.preset or args.config:
            raise
        raise ValueError(f"{error}. The columns are those of another data set: give --preset {preset}") from error


def _filter(work: "Filter", groups: "list[FileGroup]") -> int:
    """Filters all files and returns the number of rows that are kept."""
    from ldm.metadata.filtering import in_batches

    work.create_tables(groups)
    progress = Progress(sum(group.rows for group in groups), "rows")
    for batch in (batch for group in groups for batch in in_batches(group)):
        work.add(batch)
        if batch.rows:
            progress.step(batch.rows)
    return work.finish()


def write_shards(work: "Filter", kept: int, rows_per_shard: int, folder: Path) -> int:
    """Writes 00000.parquet, …, with numbers of rows that differ by at most one, and returns the number of shards."""
    shards = -(-kept // rows_per_shard)
    edges = [i * kept // max(shards, 1) for i in range(shards + 1)]
    folder.mkdir()
    for i in range(shards):
        work.write(folder / f"{i:05d}.parquet", edges[i], edges[i + 1])
    return shards


def _predict(work: "Filter", groups: "list[FileGroup]", args: argparse.Namespace) -> None:
    from ldm.commands.filter import report as filter_report
    from ldm.metadata.filtering import sample_of
    from ldm.metadata.forecast import predict, statistics

    sample = sample_of(groups, args.sample_rows, work.folder)
    work.create_tables(sample)
    for group in sample:
        work.add(group)
    kept = work.finish()
    out = work.folder / "kept.parquet"
    work.write(out, 0, kept)
    rows = sum(group.rows for group in groups)
    cost = args.size, args.alive, args.pictures_per_second
    forecast = predict(rows, work.tally.rows, kept, out.stat().st_size, *cost)
    filter_report.print_forecast(forecast, [statistics(group) for group in groups], work)


def _move(folder: Path, out: Path) -> None:
    if out.exists():
        out.rmdir()  # it was empty when checked; if it has files now, this fails and nothing is lost
    os.replace(folder, out)


def _check(args: argparse.Namespace) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"ldm filter needs {', '.join(missing)}: pip install 'ldm[laion]'")
    if args.out is None and not args.dry_run:
        raise UsageError("--out is missing: give --out F, the folder for the kept rows, or --dry-run")
    if args.out is not None and args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UsageError(f"{args.out} exists and is not an empty folder: give another --out, or remove it")
    if args.out is not None:
        check_writable(args.out.parent)
        for given in args.inputs:
            check_outside(args.out, given, "--out", "input")
    for name in ("rows_per_shard", "threads", "sample_rows", "size", "pictures_per_second"):
        most = MAX_THREADS if name == "threads" else MAX_NUMBER
        if not 0 < getattr(args, name) <= most:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected more than 0, up to {most:g}")
    for name in ("max_bad_share", "alive"):
        if not 0 <= getattr(args, name) <= 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a share from 0 to 1")


def _check_patterns(work: "Filter", cuts: Thresholds) -> None:
    import duckdb

    for name in ("caption_match", "caption_exclude"):
        try:
            work.connection.execute("SELECT regexp_matches('', ?)", [getattr(cuts, name) or ""])
        except duckdb.Error as error:
            raise UsageError(f"{name}={getattr(cuts, name)} is not a regular expression of RE2: {error}") from error


def _check_damage(work: "Filter", groups: "list[FileGroup]", limit: float) -> None:
    """Raises ValueError if the share of unreadable rows exceeds `limit`; a file without footer counts as average."""
    average = work.tally.rows // sum(len(group.sources) for group in groups)
    lost = sum(d.rows or average for d in work.damaged)
    share = lost / max(work.tally.rows + lost, 1)
    if share > limit:
        worst = max(work.damaged, key=lambda d: d.rows or average)
        raise ValueError(
            f"{lost:,} of {work.tally.rows + lost:,} rows are unreadable, more than --max-bad-share {limit:g}, most of "
            f"them in {worst.path} ({worst.reason}): repair the files or raise --max-bad-share"
        )


def _usage(parse: Any) -> Any:
    """Returns `parse()`, with a ValueError turned into a UsageError."""
    try:
        return parse()
    except ValueError as error:
        raise UsageError(str(error)) from error
