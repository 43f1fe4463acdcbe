"""`ldm status`: what runs are doing, renewed while one looks."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from ldm.errors import UsageError
from ldm.files import is_locked
from ldm.progress import clock
from ldm.report.comparison import metrics_of
from ldm.report.runs import SPEED, WAITING, Run, read_run, trained

RECORDS = ("config.yaml", "metrics.json")
DAY = 86400
SEARCHED = 3  # folders below the given ones
COLUMNS = ("run", "state", "step", "images/s", "left", "latest")
ORDER = ("in progress", "starting", "waiting", "stopped", "damaged", "finished")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A table of runs: what each is doing, how far it is, how fast, for how long still, and its latest numbers. "
        "In a terminal it renews itself until Ctrl-C; elsewhere it is printed once. States: waiting (of a sweep, and "
        "not begun), starting (before the first logged step), in progress, stopped (by a user, a signal, a crash or "
        "trainer.max_time: it goes on with resume=auto, or with its sweep), finished."
    )
    parser.add_argument("runs", nargs="*", default=["runs"], metavar="RUNS", help="runs, or folders of them (runs)")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (%(default)s)")
    parser.add_argument("--once", action="store_true", help="look once")


def run(args: argparse.Namespace) -> None:
    if not 0 < args.every < DAY:
        raise UsageError(f"--every {args.every:g}: expected more than 0 seconds, and less than a day's {DAY:,}")
    done: dict[Path, Run] = {}
    while True:
        folders = found(args.runs)
        if not folders:
            raise FileNotFoundError(f"there is no run in {', '.join(args.runs)}; give the folder that train.py named")
        for folder in folders:
            begun = any((folder / name).exists() for name in RECORDS)
            if begun and (folder not in done or is_locked(folder) or done[folder].state == "in progress"):
                done[folder] = read_run(folder)
        live = sys.stdout.isatty() and not args.once
        show([done.get(folder) or to_come(folder) for folder in folders], live)
        if not live:
            return
        time.sleep(args.every)


def to_come(folder: Path) -> Run:
    """A run that a sweep has marked and not begun; it will, while the sweep's process lives."""
    if is_locked(folder.parent):
        return Run(folder, "waiting")
    return Run(folder, "stopped", "before it began; the same sweep again begins it")


def found(paths: list[str]) -> list[Path]:
    """Every run at or below these. Raises FileNotFoundError for a path that is not there."""
    folders: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"there is no folder {path}; give runs, or a folder of them")
        for folder, below, names in os.walk(path):
            if Path(folder).name == WAITING:
                folders += [Path(folder).parent / name for name in names]
            elif {*RECORDS} & {*names}:
                folders.append(Path(folder))
                below.clear()
            elif len(Path(folder).relative_to(path).parts) >= SEARCHED:
                below.clear()
    return sorted(set(folders))


def show(runs: list[Run], live: bool) -> None:
    """Over what was shown before, in a terminal, and no larger than that."""
    rows = sorted((row(run) for run in runs), key=lambda cells: (ORDER.index(cells[1]), cells[0]))
    widths = [max(len(cells[i]) for cells in [COLUMNS, *rows]) for i in range(len(COLUMNS) - 1)]
    lines = [
        "  ".join([*(c.ljust(w) for c, w in zip(cells, widths, strict=False)), cells[-1]]) for cells in [COLUMNS, *rows]
    ]
    if live:
        size = shutil.get_terminal_size()
        more = f"… and {len(lines) - size.lines + 2} more" if len(lines) >= size.lines else None
        lines = [line[: size.columns] for line in lines[: size.lines - 2 if more else None]] + ([more] if more else [])
        print("\x1b[H\x1b[J", end="")
    print("\n".join(lines), flush=True)


def row(run: Run) -> tuple[str, ...]:
    measured, steps = run.provenance.get("steps"), run.config.get("trainer.max_steps")
    step = max(trained(run.scalars), measured if isinstance(measured, int) else 0)
    steps = steps if isinstance(steps, int) and steps > 0 else None  # -1: until max_epochs
    speed = run.scalars[SPEED].values[-1] if SPEED in run.scalars else None
    state = "starting" if run.state == "in progress" and not step else run.state
    going = state == "in progress" and speed and steps
    return (
        str(run.path),
        state,
        f"{step}/{steps}" if steps else str(step),
        f"{speed:.4g}" if speed else "",
        clock((steps - step) * run.batch / speed) if going else "",  # type: ignore[operator]
        latest(run),
    )


def latest(run: Run) -> str:
    """The headline metrics of a run that is measured, else its last losses."""
    if run.metrics:
        told = [f"{m.title} {m.write(run.metrics[m.key])}" for m in metrics_of([[run]]) if m.headline]
        return ", ".join(told[:3]) or run.note
    losses = [f"{name} {curve.values[-1]:.4g}" for name, curve in run.scalars.items() if name.endswith("/loss")]
    return ", ".join(losses) or run.note
