"""`ldm compare`: which run is better, by how much, and how sure that is."""

import argparse
import json
from pathlib import Path

from ldm.errors import UsageError
from ldm.ownership import Record
from ldm.report.comparison import compare, plain
from ldm.report.figures import drawn, plots
from ldm.report.page import html, markdown
from ldm.report.pictures import side_by_side
from ldm.report.runs import read_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare runs: means over seeds with 95 % intervals, differences with p-values, curves, pictures of the same "
        "prompt and noise side by side. Runs that differ only in their seed count as one group; what was measured "
        "differently is marked. Writes report.html (opens without a network), report.md and report.json, over those of "
        "an earlier comparison, too, unless they were changed since."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a JSON file of `ldm evaluate`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also write every plot there as SVG and PDF")


def run(args: argparse.Namespace) -> None:
    if len({Path(path).resolve() for path in args.runs}) < len(args.runs):
        raise UsageError("a run is given twice; give each once")
    comparison = compare([run for path in args.runs for run in read_runs(path)])
    made = plots(comparison)
    rows, remarks = side_by_side(comparison.groups)
    report = {
        "report.html": html(comparison, made, rows, remarks),
        "report.md": markdown(comparison),
        "report.json": json.dumps(plain(comparison), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    write([(args.out, {name: text.encode() for name, text in report.items()}), (args.figures, drawn(made))])
    for text in comparison.sentences:
        print(text)
    for one in comparison.runs:
        if one.state != "finished" or one.note:
            print(f"{one.path}: {one.state}{f', {one.note}' if one.note else ''}")
    print(args.out / "report.html")


def write(outputs: list[tuple[Path | None, dict[str, bytes]]]) -> None:
    """Files by name into their folders. Raises FileExistsError before the first where there is any other file."""
    records = [(Record(folder, "compare"), files) for folder, files in outputs if folder]
    for record, files in records:
        record.check(files)
    for record, files in records:
        record.write(files)
