"""Reports the result of `ldm filter`: printed lines, and a JSON report with a figure beside the shards."""

import json
import resource
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import duckdb

from ldm.files import atomic_write, write_json
from ldm.metadata.filtering import FileGroup, Filter
from ldm.metadata.funnel_figure import draw, save
from ldm.metadata.rules import Thresholds
from ldm.ownership import refuse


def print_columns(groups: list[FileGroup], cuts: Thresholds, has_nsfw: bool) -> None:
    """Prints the columns that are read, once for each naming of columns among the files."""
    for columns in {tuple(group.columns.items()) for group in groups}:
        print("columns: " + ", ".join(f"{name}={column}" for name, column in columns))
    if fallback := nsfw_fallback(cuts, has_nsfw):
        print(fallback)


def nsfw_fallback(cuts: Thresholds, has_nsfw: bool) -> str | None:
    """Returns a message that punsafe is used in place of the NSFW column, None if it is not."""
    if cuts.nsfw is None or has_nsfw or cuts.max_unsafe is None:
        return None
    return f"not every file has an NSFW column: punsafe < {cuts.max_unsafe:g} stands in for NSFW {cuts.nsfw}"


def build(
    inputs: list[str],
    cuts: Thresholds,
    groups: list[FileGroup],
    work: Filter,
    has_nsfw: bool,
    shards: int,
    seconds: float,
) -> dict[str, Any]:
    """Returns the report; its "damaged" lists every file and row group that could not be read completely."""
    tally = work.tally
    axes = {axis.title: axis for axis in work.axes}
    return {
        "inputs": inputs,
        "files": sum(len(group.sources) for group in groups),
        "rows": tally.rows,
        "kept": tally.kept,
        "shards": shards,
        "funnel": tally.steps(work.rules),
        "thresholds": asdict(cuts),
        "stand_in": nsfw_fallback(cuts, has_nsfw),
        "columns": [group.columns for group in groups],
        "nulls": dict(tally.nulls),
        "uncoercible": {name: count for name, count in tally.uncoercible.items() if count},
        "damaged": [asdict(damaged) for damaged in work.damaged],
        "histograms": {
            title: {"low": axes[title].low, "high": axes[title].high, "cuts": axes[title].cuts, "counts": counts}
            for title, counts in tally.histograms.items()
        },
        "histograms_of_one_row_in": work.every,
        "seconds": seconds,
        "rows_per_second": tally.rows / max(seconds, 1e-9),
        "peak_memory_bytes": peak_memory(),
        "duckdb": duckdb.__version__,
    }


def peak_memory() -> int:
    """Returns the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def paths(out: Path) -> tuple[Path, Path]:
    """Returns the paths of `OUT.report.json` and `OUT.report.png`, beside `out`."""
    return out.with_name(f"{out.name}.report.json"), out.with_name(f"{out.name}.report.png")


def check_replaceable(out: Path) -> None:
    """Raises FileExistsError if the report would replace another kind of file."""
    data, figure = paths(out)
    if not _is_report(data):
        existing = [path for path in (data, figure) if path.exists()]
        refuse(existing, "ldm filter", "move it away, or give another --out")


def _is_report(path: Path) -> bool:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"inputs", "funnel", "thresholds", "kept"} <= content.keys()


def write(out: Path, report: dict[str, Any]) -> None:
    figure = draw(report["funnel"], report["rows"], report["histograms"], report["histograms_of_one_row_in"])
    data, image = paths(out)
    write_json(data, report)
    atomic_write(image, partial(save, figure))


def print_summary(report: dict[str, Any], out: Path) -> None:
    print(f"{report['rows']:>15,} rows")
    for step in report["funnel"]:
        print(f"{-step['rejected']:>15,} {step['reason']}")
    print(f"{report['kept']:>15,} kept, in {report['shards']} shard{'s' * (report['shards'] != 1)} of {out}")
    for name, count in report["uncoercible"].items():
        print(f"{count:,} values of {name} could not be converted and count as missing")
    for damaged in report["damaged"]:
        print(f"unreadable: {damaged['rows']:,} rows of {damaged['path']}: {damaged['reason']}")
    print(f"{report['rows_per_second']:,.0f} rows/s; report: {out}.report.json, {out}.report.png")


def print_forecast(forecast: dict[str, Any], statistics: list[dict[str, Any]], work: Filter) -> None:
    """Prints the prediction and its assumptions."""
    for columns in statistics:
        for name, column in columns.items():
            print(f"{name}: {column['min']} to {column['max']}, {column['nulls']:,} nulls (from the footers)")
    for step in work.tally.steps(work.rules):
        print(f"{-step['rejected'] / max(work.tally.rows, 1):>10.2%} {step['reason']}")
    low, high = forecast["kept_rows_95"]
    assumed = forecast["assumed"]
    print(
        f"sample: {forecast['sampled_rows']:,} of {forecast['rows']:,} rows, {forecast['kept_share']:.3%} kept\n"
        f"kept rows: {forecast['kept_rows']:,} (95 %: {low:,} to {high:,}, without dropping all duplicates)\n"
        f"metadata of the kept rows: {_bytes(forecast['metadata_bytes'])}\n"
        f"images: {forecast['pictures']:,}, {_bytes(forecast['picture_bytes'])}, if {assumed['alive']:.0%} of the "
        f"URLs answer and images have {assumed['size']} pixels per side\n"
        f"download: {forecast['download_hours']:,.2f} h at {assumed['pictures_per_second']:,.0f} URLs/s\n"
        f"latent cache: {_bytes(forecast['cache_bytes'])}"
    )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"
