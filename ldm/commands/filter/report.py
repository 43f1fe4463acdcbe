"""What `ldm filter` says: lines for people, and a report in JSON with its picture beside the shards."""

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
    """Which column is read as what; once for every way in which the files spell theirs."""
    for columns in {tuple(group.columns.items()) for group in groups}:
        print("columns: " + ", ".join(f"{name}={column}" for name, column in columns))
    if stand_in(cuts, has_nsfw):
        print(stand_in(cuts, has_nsfw))


def stand_in(cuts: Thresholds, has_nsfw: bool) -> str | None:
    if cuts.nsfw is None or has_nsfw or cuts.max_unsafe is None:
        return None
    return f"no NSFW column in every file: punsafe < {cuts.max_unsafe:g} stands in for NSFW {cuts.nsfw}"


def about(
    inputs: list[str],
    cuts: Thresholds,
    groups: list[FileGroup],
    work: Filter,
    has_nsfw: bool,
    shards: int,
    seconds: float,
) -> dict[str, Any]:
    """The report. `damaged` names every file and row group that could not be read in full."""
    tally = work.tally
    cut = {axis.title: axis for axis in work.axes}
    return {
        "inputs": inputs,
        "files": sum(len(group.sources) for group in groups),
        "rows": tally.rows,
        "kept": tally.kept,
        "shards": shards,
        "funnel": tally.steps(work.rules),
        "thresholds": asdict(cuts),
        "stand_in": stand_in(cuts, has_nsfw),
        "columns": [group.columns for group in groups],
        "nulls": dict(tally.nulls),
        "uncoercible": {name: count for name, count in tally.uncoercible.items() if count},
        "damaged": [asdict(damaged) for damaged in work.damaged],
        "histograms": {
            title: {"low": cut[title].low, "high": cut[title].high, "cuts": cut[title].cuts, "counts": counts}
            for title, counts in tally.histograms.items()
        },
        "histograms_of_one_row_in": work.every,
        "seconds": seconds,
        "rows_per_second": tally.rows / max(seconds, 1e-9),
        "peak_memory_bytes": peak_memory(),
        "duckdb": duckdb.__version__,
    }


def peak_memory() -> int:
    """Of this process since its start."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def paths(out: Path) -> tuple[Path, Path]:
    """`OUT.report.json` and `OUT.report.png`, beside `out`."""
    return out.with_name(f"{out.name}.report.json"), out.with_name(f"{out.name}.report.png")


def check_replaceable(out: Path) -> None:
    """Raises FileExistsError where another kind of file is where the report is to be."""
    report, picture = paths(out)
    if not _is_report(report):
        refuse(
            [path for path in (report, picture) if path.exists()], "ldm filter", "move it away, or give another --out"
        )


def _is_report(path: Path) -> bool:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and {"inputs", "funnel", "thresholds", "kept"} <= held.keys()


def write(out: Path, report: dict[str, Any]) -> None:
    figure = draw(report["funnel"], report["rows"], report["histograms"], report["histograms_of_one_row_in"])
    data, picture = paths(out)
    write_json(data, report)
    atomic_write(picture, partial(save, figure))


def print_summary(report: dict[str, Any], out: Path) -> None:
    print(f"{report['rows']:>15,} rows")
    for step in report["funnel"]:
        print(f"{-step['rejected']:>15,} {step['reason']}")
    print(f"{report['kept']:>15,} kept, in {report['shards']} shard{'s' * (report['shards'] != 1)} of {out}")
    for name, count in report["uncoercible"].items():
        print(f"{count:,} values of {name} could not be coerced and count as missing")
    for damaged in report["damaged"]:
        print(f"damaged: {damaged['path']}: {damaged['rows']:,} rows lost: {damaged['reason']}")
    print(f"{report['rows_per_second']:,.0f} rows/s; report: {out}.report.json, {out}.report.png")


def print_forecast(forecast: dict[str, Any], statistics: list[dict[str, Any]], work: Filter) -> None:
    """The prediction, with what it assumes."""
    for known in statistics:
        for name, told in known.items():
            print(f"{name}: {told['min']} to {told['max']}, {told['nulls']:,} nulls (from the footers)")
    for step in work.tally.steps(work.rules):
        print(f"{-step['rejected'] / max(work.tally.rows, 1):>10.2%} {step['reason']}")
    low, high = forecast["kept_rows_95"]
    assumed = forecast["assumed"]
    print(
        f"sample: {forecast['sampled_rows']:,} of {forecast['rows']:,} rows, {forecast['kept_share']:.3%} kept\n"
        f"kept rows: {forecast['kept_rows']:,} (95 %: {low:,} to {high:,}, before duplicates that no sample shows)\n"
        f"their metadata: {_bytes(forecast['metadata_bytes'])}\n"
        f"pictures: {forecast['pictures']:,}, {_bytes(forecast['picture_bytes'])}, if {assumed['alive']:.0%} of the "
        f"addresses answer and a picture has {assumed['size']} px a side\n"
        f"download: {forecast['download_hours']:,.2f} h at {assumed['pictures_per_second']:,.0f} addresses/s\n"
        f"latent cache: {_bytes(forecast['cache_bytes'])}"
    )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"
