"""`ldm compare`: which run is better, by how much, and with what certainty."""

import argparse
import json
from pathlib import Path

from ldm.errors import UsageError
from ldm.metrics.few_samples import MIN_IMAGES
from ldm.ownership import Record
from ldm.report.comparison import MIN_SEEDS, compare, plain
from ldm.report.figures import plots, rendered
from ldm.report.images import side_by_side
from ldm.report.page import conclusions, html, legend, markdown
from ldm.report.runs import read_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare runs: means over seeds with 95 % intervals, differences with p-values, curves, and images of the same "
        "prompt and noise side by side. Runs that differ only in their seed form one group; values that were measured "
        f"differently are marked, and no difference is claimed below {MIN_SEEDS} seeds per group and {MIN_IMAGES} "
        "images. Writes report.html (self-contained, readable offline), report.md and report.json. Overwrites the "
        "files of an earlier comparison, unless they were changed since."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a JSON file of `ldm evaluate`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="also write all plots to this folder as SVG and PDF"
    )


def run(args: argparse.Namespace) -> None:
    if len({Path(path).resolve() for path in args.runs}) < len(args.runs):
        raise UsageError("a run is given twice; give each run once")
    comparison = compare([run for path in args.runs for run in read_runs(path)])
    figures = plots(comparison)
    rows, image_notes = side_by_side(comparison.groups)
    report = {
        "report.html": html(comparison, figures, rows, image_notes),
        "report.md": markdown(comparison),
        "report.json": json.dumps(plain(comparison), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    write([(args.out, {name: text.encode() for name, text in report.items()}), (args.figures, rendered(figures))])
    for name, text in legend(comparison):
        print(f"{name}: {text}")
    for text in conclusions(comparison):
        print(text)
    if comparison.coverage:
        print(comparison.coverage)
    for each in comparison.runs:
        if each.state != "finished" or each.note:
            print(f"{each.path}: {each.state}{f', {each.note}' if each.note else ''}")
    print(args.out / "report.html")


def write(outputs: list[tuple[Path | None, dict[str, bytes]]]) -> None:
    """Writes files by name to their folders. Raises FileExistsError before writing if any is not from a comparison."""
    records = [(Record(folder, "compare"), files) for folder, files in outputs if folder]
    for record, files in records:
        record.check(files)
    for record, files in records:
        record.write(files)
