"""`ldm status`: a table of runs and their progress, refreshed while it is shown."""

import argparse
import os
import platform
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from ldm.errors import UsageError
from ldm.files import is_locked
from ldm.progress import clock
from ldm.report.metric import metrics_of
from ldm.report.runs import OUTCOME, SPEED, STATES, WAITING, Run, read_run, trained

RECORDS = ("config.yaml", "metrics.json", OUTCOME)
DAY = 86400
DEPTH = 3  # levels of folders searched below the given ones
ALIVE = ("in progress", "stalled", "unknown")  # these may change although no lock is seen here
COLUMNS = ("run", "state", "step", "images/s", "left", "latest")


def run(args: argparse.Namespace) -> None:
    if not 0 < args.every < DAY:
        raise UsageError(f"--every {args.every:g}: expected more than 0 and less than {DAY:,} seconds (a day)")
    done: dict[Path, Run] = {}
    while True:
        folders = find_runs(args.runs)
        if not folders:
            raise FileNotFoundError(f"no run found in {', '.join(args.runs)}; give the folder that train.py printed")
        for folder in folders:
            started = any((folder / name).exists() for name in RECORDS)
            if started and (folder not in done or is_locked(folder) or done[folder].state in ALIVE):
                done[folder] = read_run(folder)
        live = sys.stdout.isatty() and not args.once
        show([done.get(folder) or waiting_run(folder) for folder in folders], live)
        if not live:
            return
        time.sleep(args.every)


def waiting_run(folder: Path) -> Run:
    """Returns the run of a sweep that has not started: waiting while the sweep's process runs, stopped afterwards.

    Its mark contains the host of the sweep, whose lock may be invisible on other hosts.
    """
    if is_locked(folder.parent):
        return Run(folder, "waiting")
    host = ""
    with suppress(OSError):  # the run has just started
        host = (folder.parent / WAITING / folder.name).read_text()
    if host not in ("", platform.node()):
        return Run(folder, "unknown", f"not started; whether its sweep on {host} still runs cannot be seen from here")
    return Run(folder, "stopped", "not started; run the same sweep again to start it")


def find_runs(paths: list[str]) -> list[Path]:
    """Returns all runs at or below the paths. Raises FileNotFoundError for a path that is not a folder."""
    folders: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"folder {path} not found; give runs, or folders of runs")
        for folder, below, names in os.walk(path):
            if Path(folder).name == WAITING:
                folders += [Path(folder).parent / name for name in names]
            elif {*RECORDS} & {*names}:
                folders.append(Path(folder))
                below.clear()
            elif len(Path(folder).relative_to(path).parts) >= DEPTH:
                below.clear()
    return sorted(set(folders))


def show(runs: list[Run], live: bool) -> None:
    """Prints the table; in a terminal it replaces the previous one and is cut to the terminal's size."""
    rows = sorted((row(run) for run in runs), key=lambda cells: (STATES.index(cells[1]), cells[0]))
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
    steps = steps if isinstance(steps, int) and steps > 0 else None  # -1 means until max_epochs
    speed = run.scalars[SPEED].values[-1] if SPEED in run.scalars else None
    state = "starting" if run.state == "in progress" and not step else run.state
    has_forecast = state == "in progress" and speed and steps
    return (
        str(run.path),
        state,
        f"{step}/{steps}" if steps else str(step),
        f"{speed:.4g}" if speed else "",
        clock((steps - step) * run.batch / speed) if has_forecast else "",  # type: ignore[operator]
        latest(run),
    )


def latest(run: Run) -> str:
    """Returns why a run does not train, or up to three headline metrics of a measured run, or else its last losses.

    A run on another host has its last sign of life, too.
    """
    if run.state in ("stalled", "unknown", "failed", "stopped", "damaged"):
        return run.note
    if run.metrics:
        headlines = [f"{m.title} {m.write(run.metrics[m.key])}" for m in metrics_of([[run]]) if m.headline]
        return "; ".join(filter(None, [", ".join(headlines[:3]), run.note]))
    losses = [f"{name} {curve.values[-1]:.4g}" for name, curve in run.scalars.items() if name.endswith("/loss")]
    return "; ".join(filter(None, [", ".join(losses), run.note if run.host else ""])) or run.note
