"""`ldm download`: downloads the images of filtered metadata into WebDataset shards with img2dataset."""

import argparse
import json
import re
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.commands.download.arguments import NUMBERS
from ldm.errors import UsageError
from ldm.files import atomic_write, check_writable, write_json, write_text
from ldm.metadata.columns import parse_choices, resolve
from ldm.metadata.img2dataset import (
    READY,
    REQUIREMENT,
    DownloadStatistics,
    add_distributor,
    check_python,
    download,
    drop_unfinished,
    ensure_environment,
)
from ldm.ownership import check_outside, refuse
from ldm.progress import Progress

if TYPE_CHECKING:
    from ldm.metadata.tables import Source

NEEDED = ("pyarrow", "fsspec", "matplotlib")
# Fields that img2dataset writes itself, so that it rejects columns with these names.
RESERVED = ("key", "url", "caption", "width", "height", "original_width", "original_height", "sha256", "md5", "status")


def run(args: argparse.Namespace) -> None:
    """Writes shards to `--out`, and report, log and settings beside it. Raises ValueError or OSError on failure."""
    _check(args)
    from ldm.metadata.tables import find, open_sources

    sources, damaged = open_sources(find([args.source]))
    if damaged:
        raise ValueError(f"{damaged[0].path} is not a readable parquet file: {damaged[0].reason}")
    if len({str(Path(source.path).parent) for source in sources}) > 1 or _is_pattern(args.source):
        raise ValueError(f"{args.source}: expected a parquet file, or a folder that contains them directly")
    settings = _settings(args, sources)
    _check_and_save_settings(
        _beside(args.out, "download.json"), settings | {"rows": [[s.path, s.rows] for s in sources]}
    )
    python = _prepare_environment(args.env, args.python)
    add_distributor(python, args.distributor, lambda text: print(text, flush=True))
    drop_unfinished(args.out)
    statistics, start = DownloadStatistics(), time.monotonic()
    earlier = statistics.update(args.out)
    if earlier:
        print(f"resuming after {earlier:,} URLs in {len(statistics.shards)} shards")
    progress = Progress(sum(s.rows for s in sources) - earlier, "URLs")

    def tick() -> None:
        if done := statistics.update(args.out):
            progress.step(done)

    parallelism = {
        "processes_count": args.processes,
        "thread_count": args.threads,
        "distributor": args.distributor,
    }
    limits = {"deadline": args.deadline, "max_bytes": args.max_bytes}
    log = _beside(args.out, "img2dataset.log")
    code = download(python, {"download": settings | parallelism, "limits": limits}, log, args.max_pixels, tick)
    report = _report(args, sources, statistics, time.monotonic() - start)
    _write(args.out, report)
    _print_summary(report, args.out)
    missing = sum(-(-s.rows // args.shard_size) for s in sources) - len(statistics.shards)
    if code or missing:
        raise OSError(f"img2dataset did not finish {missing} shards (exit code {code}): see {log}, then run it again")


def _is_pattern(source: str) -> bool:
    return any(c in source for c in "*?[") and not Path(source).exists()


def _prepare_environment(folder: Path, python: str) -> Path:
    """Creates the environment if needed and returns its Python.

    Raises ValueError for a virtual environment that ldm did not create, because creating one empties the folder.
    """
    marker = folder.with_name(f".{folder.name}.ldm_download")  # exists while ldm creates the environment
    ready = (folder / READY).is_file()
    if (folder / "pyvenv.cfg").is_file() and not ready and not marker.is_file():
        raise ValueError(f"--env {folder} is a virtual environment that ldm did not create: give a new folder")
    if not ready:
        write_text(marker, "")
    python_path = ensure_environment(folder, python, lambda text: print(text, flush=True))
    marker.unlink(missing_ok=True)
    return python_path


def _settings(args: argparse.Namespace, sources: "list[Source]") -> dict[str, Any]:
    """Returns the arguments of img2dataset that determine the content of the shards."""
    found = [resolve(s.schema.names, ("url", "caption"), _choices(args), s.path) for s in sources]
    for source, columns in zip(sources, found, strict=True):
        if columns != found[0]:
            raise ValueError(f"{source.path} and {sources[0].path} have different column names: run ldm filter first")
    return {
        "url_list": str(Path(args.source).resolve()) if Path(args.source).exists() else args.source,
        "input_format": "parquet",
        "url_col": found[0]["url"],
        "caption_col": found[0]["caption"],
        "save_additional_columns": [
            column
            for name, column in found[0].items()
            if name not in ("url", "caption", "width", "height") and column not in RESERVED
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
    """Raises FileExistsError for a folder that ldm download did not create, whose files might be replaced."""
    if _beside(out, "download.json").is_file():
        foreign = [path for path in out.glob("*_stats.json") if not re.fullmatch(r"\d{5,}_stats\.json", path.name)]
    else:
        reports = [_beside(out, name) for name in ("report.json", "report.png", "img2dataset.log")]
        foreign = [path for path in reports if path.exists()] + (sorted(out.iterdir()) if out.exists() else [])
    refuse(foreign, "ldm download", "move it away, or give another --out")


def _check_and_save_settings(path: Path, settings: dict[str, Any]) -> None:
    """Saves the settings to `path`. Raises ValueError if the download began with other settings.

    Shards have only numbers, so resuming with other rows or settings would mix two data sets.
    """
    if path.is_file():
        before = _read_settings(path)
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"the download of {path} began with {name}={before.get(name)}, not {value}: give the same "
                    "value, or another --out"
                )
    write_json(path, settings)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not contain the settings of a download: move it away, or give another --out")
    return settings


def _report(
    args: argparse.Namespace, sources: "list[Source]", statistics: DownloadStatistics, seconds: float
) -> dict[str, Any]:
    """Returns the filter's report, if there is one beside the input, with the results of the download added."""
    path = _beside(Path(args.source), "report.json")
    earlier: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    rows = sum(source.rows for source in sources)
    left, steps = rows, []
    for reason, lost in (
        ("not_tried", rows - statistics.count),
        ("failed_to_download", statistics.failed_to_download),
        ("failed_to_decode", statistics.failed_to_resize),
    ):
        left -= lost
        steps.append({"reason": reason, "rejected": lost, "left": left, "alone": lost})
    return earlier | {
        "rows": earlier.get("rows", rows),
        "funnel": [*earlier.get("funnel", []), *steps],
        "download": {
            "addresses": rows,
            "tried": statistics.count,
            "pictures": statistics.successes,
            "failed_to_download": statistics.failed_to_download,
            "failed_to_decode": statistics.failed_to_resize,
            "reasons": dict(statistics.reasons.most_common()),
            "shards": len(statistics.shards),
            "seconds_of_work": statistics.seconds_of_work,
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


def _print_summary(report: dict[str, Any], out: Path) -> None:
    result = report["download"]
    print(f"{result['pictures']:,} images of {result['addresses']:,} URLs in {result['shards']} shards of {out}")
    for reason, count in list(result["reasons"].items())[:10]:
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
