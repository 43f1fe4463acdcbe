"""`ldm filter`: metadata in parquet, cut down to the rows worth downloading, with a report of what went and why."""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import UsageError
from ldm.files import check_writable
from ldm.metadata.columns import ALIASES, parse_choices
from ldm.metadata.rules import Thresholds, rules
from ldm.ownership import check_outside
from ldm.progress import Progress

if TYPE_CHECKING:
    from ldm.metadata.filtering import FileGroup, Filter

CONFIG = Path(__file__).parents[2] / "assets" / "laion_sd15_filter.yaml"
NEEDED = ("duckdb", "pyarrow", "matplotlib")
MOST, MOST_THREADS = 1e9, 1024
WORDS = ("nsfw", "language", "caption_match", "caption_exclude")
UNITS = {
    "min_aesthetic": "score, 1 to 10",
    "min_similarity": "cosine",
    "min_side": "pixels",
    "min_aspect": "width / height",
    "max_aspect": "width / height",
    "max_watermark": "probability; the cut itself goes",
    "nsfw": "label of the NSFW column",
    "max_unsafe": "probability, where there is no NSFW column",
    "language": "label of the LANGUAGE column, such as en",
    "min_caption": "code points",
    "max_caption": "code points",
    "caption_match": "regular expression (RE2) that must match",
    "caption_exclude": "regular expression (RE2) that must not match",
    "deduplicate": "true or false",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Keep the rows of metadata in parquet that pass every rule, and say why the others went."
    parser.add_argument(
        "inputs", nargs="+", metavar="IN", help="file, folder, glob, or s3://, hf://datasets/, https:// …"
    )
    parser.add_argument("--out", type=Path, metavar="F", help="folder for the shards; F.report.json and .png beside it")
    parser.add_argument(
        "--config", type=Path, default=CONFIG, metavar="F", help=f"rules in YAML (default: {CONFIG.name})"
    )
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=COLUMN", help=f"NAME: {', '.join(ALIASES)}"
    )
    cuts = parser.add_argument_group("rules", "These go before the config file; none switches a rule off.")
    for field in fields(Thresholds):
        option = "--" + field.name.replace("_", "-")
        cuts.add_argument(option, default=argparse.SUPPRESS, metavar="X", help=UNITS[field.name])
    _number(parser, "--rows-per-shard", int, 1_000_000, "rows a shard at most; shards differ by one row at most")
    _number(parser, "--threads", int, min(os.cpu_count() or 1, 16), "threads")
    _number(parser, "--max-bad-share", float, 0.01, "share of rows that may be unreadable, 0 to 1")
    parser.add_argument("--dry-run", action="store_true", help="read footers and a sample; predict, write nothing")
    _number(parser, "--sample-rows", int, 200_000, "rows that --dry-run reads")
    _number(parser, "--size", int, 512, "pixels a side, for what --dry-run predicts")
    _number(parser, "--alive", float, 0.75, "share of addresses that still answer, for what --dry-run predicts")
    # 100 M addresses in 20 h on one machine, as img2dataset's README has it.
    _number(parser, "--pictures-per-second", float, 1389, "download speed, for what --dry-run predicts")


def _number(parser: argparse.ArgumentParser, name: str, kind: type, default: float, unit: str) -> None:
    parser.add_argument(name, type=kind, default=default, metavar="N", help=f"{unit} (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Write shards and report, or print a prediction; ValueError or OSError in one sentence on failure."""
    _check(args)
    cuts, chosen = thresholds(args), _usage(lambda: parse_choices(args.column))
    from ldm.commands.filter import report as filter_report
    from ldm.metadata.filtering import Filter, database, file_groups, in_batches
    from ldm.metadata.funnel import axes
    from ldm.metadata.tables import find, open_sources

    if not args.dry_run:
        filter_report.check_replaceable(args.out)
    began = time.monotonic()
    sources, damaged = open_sources(find(args.inputs))
    if not sources:
        raise ValueError(f"none of the files can be read: {damaged[0].path}: {damaged[0].reason}")
    has_nsfw = cuts.nsfw is not None and all("nsfw" in group.columns for group in file_groups(sources, [], chosen))
    if cuts.nsfw is not None and not has_nsfw and cuts.max_unsafe is None:
        raise ValueError(f"nsfw is {cuts.nsfw}, but there is no NSFW column: give --max-unsafe, or --nsfw none")
    asked = rules(cuts, has_nsfw)
    groups = file_groups(sources, dict.fromkeys(name for rule in asked for name in rule.columns), chosen)
    filter_report.print_columns(groups, cuts, has_nsfw)
    with workspace(args.out) as folder, database(folder, args.threads) as connection:
        work = Filter(connection, asked, axes(cuts, asked), cuts.deduplicate, folder, damaged=damaged)
        _check_patterns(work, cuts)
        if args.dry_run:
            _predict(work, groups, args)
            return
        work.begin(groups)
        progress = Progress(sum(group.rows for group in groups), "rows")
        for batch in (batch for group in groups for batch in in_batches(group)):
            work.add(batch)
            if batch.rows:
                progress.step(batch.rows)
        kept = work.finish()
        _check_damage(work, groups, args.max_bad_share)
        shards = write_shards(work, kept, args.rows_per_shard, folder / "kept")
        report = filter_report.about(args.inputs, cuts, groups, work, has_nsfw, shards, time.monotonic() - began)
        _move(folder / "kept", args.out)
    filter_report.write(args.out, report)
    filter_report.print_summary(report, args.out)


def thresholds(args: argparse.Namespace) -> Thresholds:
    """The config file's rules, those of the command line before them; UsageError for what is neither."""
    try:
        read = OmegaConf.to_container(OmegaConf.load(args.config))
    except (OSError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UsageError(f"--config {args.config} cannot be read: {' '.join(str(error).split())}") from error
    names = [field.name for field in fields(Thresholds)]
    read = read if isinstance(read, dict) else {}
    keys = {str(key) for key in read}
    if odd := [f"lacks {name}" for name in names if name not in keys] or sorted(f"has {k}" for k in keys - {*names}):
        raise UsageError(f"--config {args.config} {', '.join(odd)}: it must have exactly the keys of {CONFIG.name}")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    cuts = Thresholds(**{name: _value(name, given.get(name, read[name])) for name in names})
    for name in ("aspect", "caption"):
        least, most = getattr(cuts, f"min_{name}"), getattr(cuts, f"max_{name}")
        if least is not None and most is not None and least > most:
            raise UsageError(f"min_{name}={least} is more than max_{name}={most}, so that no row would be kept")
    return cuts


def _value(name: str, value: Any) -> Any:
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if name == "deduplicate":
            raise UsageError(f"{name}={value}: expected true or false")
        return None
    if name in WORDS:
        return str(value)
    if name == "deduplicate":
        if str(value).lower() not in ("true", "false"):
            raise UsageError(f"{name}={value}: expected true or false")
        return str(value).lower() == "true"
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}={value}: expected a number, or none") from error
    if not abs(number) < MOST:
        raise UsageError(f"{name}={value}: expected a finite number below {MOST:g}, or none")
    return int(number) if number.is_integer() else number


@contextmanager
def workspace(out: Path | None) -> Iterator[Path]:
    """A folder beside `out`, or among the system's temporary ones, that goes whatever happens."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}." if out else "ldm.", suffix=".tmp", dir=out and out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def write_shards(work: "Filter", kept: int, rows_per_shard: int, folder: Path) -> int:
    """00000.parquet and on, the number of their rows apart by one at most; returns how many."""
    shards = -(-kept // rows_per_shard)
    edges = [i * kept // max(shards, 1) for i in range(shards + 1)]
    folder.mkdir()
    for i in range(shards):
        work.write(folder / f"{i:05d}.parquet", edges[i], edges[i + 1])
    return shards


def _predict(work: "Filter", groups: "list[FileGroup]", args: argparse.Namespace) -> None:
    from ldm.commands.filter import report as filter_report
    from ldm.metadata.filtering import sample_of
    from ldm.metadata.forecast import predicted, statistics

    sample = sample_of(groups, args.sample_rows, work.folder)
    work.begin(sample)
    for group in sample:
        work.add(group)
    kept = work.finish()
    out = work.folder / "kept.parquet"
    work.write(out, 0, kept)
    rows = sum(group.rows for group in groups)
    cost = args.size, args.alive, args.pictures_per_second
    forecast = predicted(rows, work.tally.rows, kept, out.stat().st_size, *cost)
    filter_report.print_forecast(forecast, [statistics(group) for group in groups], work)


def _move(folder: Path, out: Path) -> None:
    if out.exists():
        out.rmdir()  # empty, as checked; where someone filled it since, this fails and nothing is lost
    os.replace(folder, out)


def _check(args: argparse.Namespace) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"ldm filter needs {', '.join(missing)}: pip install 'ldm[laion]'")
    if args.out is None and not args.dry_run:
        raise UsageError("give --out F, the folder for what is kept, or --dry-run")
    if args.out is not None and args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UsageError(f"{args.out} is there already and not an empty folder: give another --out, or remove it")
    if args.out is not None:
        check_writable(args.out.parent)
        for given in args.inputs:
            check_outside(args.out, given, "--out", "input")
    for name in ("rows_per_shard", "threads", "sample_rows", "size", "pictures_per_second"):
        most = MOST_THREADS if name == "threads" else MOST
        if not 0 < getattr(args, name) <= most:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected more than 0, up to {most:g}")
    for name in ("max_bad_share", "alive"):
        if not 0 <= getattr(args, name) <= 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 0 to 1")


def _check_patterns(work: "Filter", cuts: Thresholds) -> None:
    import duckdb

    for name in ("caption_match", "caption_exclude"):
        try:
            work.connection.execute("SELECT regexp_matches('', ?)", [getattr(cuts, name) or ""])
        except duckdb.Error as error:
            raise UsageError(f"{name} is no regular expression of RE2: {getattr(cuts, name)} ({error})") from error


def _check_damage(work: "Filter", groups: "list[FileGroup]", limit: float) -> None:
    """ValueError where more rows than the user allows could not be read; a file without footer counts as an average."""
    average = work.tally.rows // sum(len(group.sources) for group in groups)
    lost = sum(d.rows or average for d in work.damaged)
    share = lost / max(work.tally.rows + lost, 1)
    if share > limit:
        worst = max(work.damaged, key=lambda d: d.rows or average)
        raise ValueError(
            f"{lost:,} of {work.tally.rows + lost:,} rows cannot be read, more than --max-bad-share {limit:g}; "
            f"most of them in {worst.path}: {worst.reason}"
        )


def _usage(work: Any) -> Any:
    try:
        return work()
    except ValueError as error:
        raise UsageError(str(error)) from error
