"""`ldm compare`: which run is better, by how much, and how sure that is."""

import argparse
from pathlib import Path

from ldm.commands.edge import UsageError
from ldm.files import write_json, write_text
from ldm.report.comparison import compare, plain
from ldm.report.figures import plots, save_plots
from ldm.report.page import html, markdown
from ldm.report.pictures import side_by_side
from ldm.report.runs import read_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare runs: means over seeds with 95 % intervals, differences with p-values, curves, pictures of the same "
        "prompt and noise side by side. Runs that differ only in their seed count as one group; what was measured "
        "differently is marked. Writes report.html (opens without a network), report.md and report.json."
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
    write_text(args.out / "report.html", html(comparison, made, rows, remarks))
    write_text(args.out / "report.md", markdown(comparison))
    write_json(args.out / "report.json", plain(comparison))
    if args.figures:
        save_plots(made, args.figures)
    for text in comparison.sentences:
        print(text)
    for one in comparison.runs:
        if one.state != "finished" or one.note:
            print(f"{one.path}: {one.state}{f', {one.note}' if one.note else ''}")
    print(args.out / "report.html")
