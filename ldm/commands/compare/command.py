"""`ldm compare`: which run is better, by how much, and with what certainty."""

import argparse
import json
from pathlib import Path

from ldm.errors import UsageError
from ldm.ownership import Record
from ldm.report.comparison import compare, plain
from ldm.report.figures import plots, rendered
from ldm.report.images import side_by_side
from ldm.report.page import conclusions, html, legend, markdown
from ldm.report.runs import read_runs


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
        print(f"{name}: {text}" if text else name)
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
