"""`ldm download`: the pictures of filtered metadata into WebDataset shards, by img2dataset."""

import argparse
import json
import os
import re
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UsageError
from ldm.files import atomic_write, check_writable, write_json, write_text
from ldm.metadata.columns import parse_choices, resolve
from ldm.metadata.img2dataset import (
    READY,
    REQUIREMENT,
    Fetched,
    check_python,
    download,
    drop_unfinished,
    environment,
)
from ldm.ownership import check_outside, refuse
from ldm.progress import Progress

if TYPE_CHECKING:
    from ldm.metadata.tables import Source

NEEDED = ("pyarrow", "fsspec", "matplotlib")
# What img2dataset writes by itself under these names, and so refuses to carry over.
ITS_OWN = ("key", "url", "caption", "width", "height", "original_width", "original_height", "sha256", "md5", "status")
NUMBERS = (
    ("processes", int, 16, "processes"),
    ("threads", int, 64, "threads a process"),
    ("size", int, 512, "pixels of the shorter side; larger pictures are scaled down to it"),
    ("min_side", int, 0, "pixels; pictures with a shorter side are left out"),
    ("shard_size", int, 10_000, "addresses a tar"),
    ("timeout", int, 10, "seconds without an answer"),
    ("deadline", float, 60, "seconds for a whole picture"),
    ("max_bytes", int, 64 << 20, "bytes of a picture file"),
    ("max_pixels", int, 100_000_000, "pixels of a picture"),
    ("retries", int, 0, "more tries of a picture that failed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"Fetch the pictures of filtered metadata into tars, with {REQUIREMENT} in an environment of its own. "
        "The same command goes on where it was stopped."
    )
    parser.add_argument("source", metavar="IN", help="a parquet file, or a folder of them, such as ldm filter writes")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for 00000.tar, …")
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ldm" / REQUIREMENT.replace("==", "-")
    parser.add_argument(
        "--env", type=Path, default=default, metavar="DIR", help="the environment (default: %(default)s)"
    )
    parser.add_argument("--python", default=sys.executable, help="Python that makes it, below 3.13 (default: this one)")
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=COLUMN", help="url or caption, as in filter"
    )
    for name, kind, value, unit in NUMBERS:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=kind, default=value, metavar="N", help=f"{unit} (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Shards in `--out`, report, log and settings beside it; ValueError or OSError in one sentence on failure."""
    _check(args)
    from ldm.metadata.tables import find, open_sources

    sources, damaged = open_sources(find([args.source]))
    if damaged:
        raise ValueError(f"{damaged[0].path} is no parquet file: {damaged[0].reason}")
    if len({str(Path(source.path).parent) for source in sources}) > 1 or any(c in args.source for c in "*?["):
        raise ValueError(f"{args.source}: expected one parquet file, or one folder with parquet files directly in it")
    settings = _settings(args, sources)
    _same_as_before(_beside(args.out, "download.json"), settings | {"rows": [[s.path, s.rows] for s in sources]})
    python = _environment(args.env, args.python)
    drop_unfinished(args.out)
    fetched, began = Fetched(), time.monotonic()
    earlier = fetched.update(args.out)
    if earlier:
        print(f"going on after {earlier:,} addresses in {len(fetched.shards)} shards")
    progress = Progress(sum(s.rows for s in sources) - earlier, "addresses")

    def tick() -> None:
        if done := fetched.update(args.out):
            progress.step(done)

    how = {"processes_count": args.processes, "thread_count": args.threads}
    limits = {"deadline": args.deadline, "max_bytes": args.max_bytes}
    log = _beside(args.out, "img2dataset.log")
    code = download(python, {"download": settings | how, "limits": limits}, log, args.max_pixels, tick)
    report = _report(args, sources, fetched, time.monotonic() - began)
    _write(args.out, report)
    _tell(report, args.out)
    missing = sum(-(-s.rows // args.shard_size) for s in sources) - len(fetched.shards)
    if code or missing:
        raise OSError(f"img2dataset left {missing} shards undone (exit code {code}): see {log}, then run this again")


def _environment(folder: Path, python: str) -> Path:
    """ValueError for a virtual environment that ldm did not make: to make one empties its folder."""
    begun = folder.with_name(f".{folder.name}.ldm_download")  # a file that is there while ldm makes one
    ready = (folder / READY).is_file()
    if (folder / "pyvenv.cfg").is_file() and not ready and not begun.is_file():
        raise ValueError(f"--env {folder} is a virtual environment that ldm did not make: give a new folder")
    if not ready:
        write_text(begun, "")
    made = environment(folder, python, lambda text: print(text, flush=True))
    begun.unlink(missing_ok=True)
    return made


def _settings(args: argparse.Namespace, sources: "list[Source]") -> dict[str, Any]:
    """The arguments of img2dataset that decide what is written."""
    found = [resolve(s.schema.names, ("url", "caption"), _choices(args), s.path) for s in sources]
    for source, columns in zip(sources, found, strict=True):
        if columns != found[0]:
            raise ValueError(f"{source.path} spells its columns otherwise than {sources[0].path}: filter them first")
    return {
        "url_list": str(Path(args.source).resolve()) if Path(args.source).exists() else args.source,
        "input_format": "parquet",
        "url_col": found[0]["url"],
        "caption_col": found[0]["caption"],
        "save_additional_columns": [
            column
            for name, column in found[0].items()
            if name not in ("url", "caption", "width", "height") and column not in ITS_OWN
        ],
        "output_folder": str(args.out.resolve()),
        "output_format": "webdataset",
        "number_sample_per_shard": args.shard_size,
        "image_size": args.size,
        "min_image_size": args.min_side,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "timeout": args.timeout,
        "retries": args.retries,
        "compute_hash": "sha256",
    }


def _choices(args: argparse.Namespace) -> dict[str, str]:
    try:
        return parse_choices(args.column)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_replaceable(out: Path) -> None:
    """Raises FileExistsError for a folder that no download began, where shards would be written over."""
    if _beside(out, "download.json").is_file():
        foreign = [path for path in out.glob("*_stats.json") if not re.fullmatch(r"\d{5,}_stats\.json", path.name)]
    else:
        there = [_beside(out, name) for name in ("report.json", "report.png", "img2dataset.log")]
        foreign = [path for path in there if path.exists()] + (sorted(out.iterdir()) if out.exists() else [])
    refuse(foreign, "ldm download", "move it away, or give another --out")


def _same_as_before(path: Path, settings: dict[str, Any]) -> None:
    """Shards are told apart by number alone, so going on with other rows or settings would mix two data sets."""
    if path.is_file():
        before = _object(path)
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{path} was begun with another {name} ({before.get(name)}, now {value}): "
                    "give the same again, or another --out"
                )
    write_json(path, settings)


def _object(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
    except ValueError:
        held = None
    if not isinstance(held, dict):
        raise ValueError(f"{path} does not say what a download was begun with: move it away, or give another --out")
    return held


def _report(args: argparse.Namespace, sources: "list[Source]", fetched: Fetched, seconds: float) -> dict[str, Any]:
    """The filter's report, where there is one beside the input, with what the download made of its rows."""
    path = _beside(Path(args.source), "report.json")
    earlier: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    rows = sum(source.rows for source in sources)
    left, steps = rows, []
    for reason, lost in (
        ("not_tried", rows - fetched.count),
        ("failed_to_download", fetched.failed_to_download),
        ("failed_to_decode", fetched.failed_to_resize),
    ):
        left -= lost
        steps.append({"reason": reason, "rejected": lost, "left": left, "alone": lost})
    return earlier | {
        "rows": earlier.get("rows", rows),
        "funnel": [*earlier.get("funnel", []), *steps],
        "download": {
            "addresses": rows,
            "tried": fetched.count,
            "pictures": fetched.successes,
            "failed_to_download": fetched.failed_to_download,
            "failed_to_decode": fetched.failed_to_resize,
            "reasons": dict(fetched.reasons.most_common()),
            "shards": len(fetched.shards),
            "seconds_of_work": fetched.seconds_of_work,
            "seconds_of_this_run": seconds,
            "with": REQUIREMENT,
        },
    }


def _write(out: Path, report: dict[str, Any]) -> None:
    from ldm.metadata.funnel_figure import draw, save

    every = report.get("histograms_of_one_row_in", 1)
    figure = draw(report["funnel"], report["rows"], report.get("histograms", {}), every)
    write_json(_beside(out, "report.json"), report)
    atomic_write(_beside(out, "report.png"), partial(save, figure))


def _tell(report: dict[str, Any], out: Path) -> None:
    told = report["download"]
    print(f"{told['pictures']:,} pictures of {told['addresses']:,} addresses in {told['shards']} shards of {out}")
    for reason, count in list(told["reasons"].items())[:10]:
        print(f"{count:>12,} {reason}")
    print(f"report: {_beside(out, 'report.json')}, {_beside(out, 'report.png')}")


def _beside(folder: Path, name: str) -> Path:
    return folder.with_name(f"{folder.name}.{name}")


def _check(args: argparse.Namespace) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"ldm download needs {', '.join(missing)}: pip install 'ldm[laion]'")
    for name, _, _, _ in NUMBERS:
        least = 0 if name in ("min_side", "retries") else 1
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {least} or more")
    if args.out.is_file():
        raise UsageError(f"--out {args.out} is a file: give a folder")
    check_outside(args.out, args.source, "--out", "input")
    _check_replaceable(args.out)
    for folder in (args.out, args.env):
        check_writable(folder)
    check_python(args.python)
