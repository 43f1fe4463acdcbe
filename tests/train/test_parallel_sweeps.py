"""Tests that a parallel sweep saves and stops all of its runs when it is interrupted."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import TINY
from tests.train.processes import Run, finish, read, start

JOBS = "seed=1,2,3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"  # the third waits for one of the others
FOREVER = "trainer.max_steps=100000", "metrics=none", "logger=none", "callbacks.previews=null"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds child processes in /proc")


def tree(process: int) -> list[int]:
    """Returns a process and all processes below it."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(below for child in children for below in tree(int(child)))]


def is_running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def interrupted(folder: Path, interrupt: Callable[[int], object]) -> tuple[Run, list[int]]:
    """Runs a sweep, interrupts its process once two runs train, and returns its output and its former processes."""
    sweep = start("-m", *TINY, *JOBS, *FOREVER, f"hydra.sweep.dir={folder}", "+callbacks.progress.seconds=0")
    while len([*folder.glob("*/config.yaml")]) < 2:
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.1)
    processes = tree(sweep.pid)
    interrupt(sweep.pid)
    run = finish(sweep)
    deadline = time.monotonic() + 60
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return run, processes


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.full_size),
    ],
)
def test_a_signal_to_a_parallel_sweep_saves_and_stops_its_runs(tmp_path: Path, number: signal.Signals) -> None:
    run, processes = interrupted(tmp_path, lambda sweep: os.kill(sweep, number))
    assert run.returncode == 128 + number, run.stderr
    folders = sorted(path.parent for path in tmp_path.glob("*/config.yaml"))
    assert [re.sub("_[0-9a-f]{12}$", "", folder.name) for folder in folders] == ["seed=1", "seed=2"]
    assert all(read(folder)["global_step"] >= 1 for folder in folders)
    assert [process for process in processes if is_running(process)] == []
    assert "run the same command to continue the sweep" in run.stderr and "Traceback" not in run.stderr
    progress = [line for line in run.stderr.splitlines() if "training: " in line]
    assert {line.partition(" ")[0] for line in progress} == {"seed=1", "seed=2"}


@pytest.mark.slow
def test_the_runs_of_a_killed_sweep_are_saved_and_leave_no_process(tmp_path: Path) -> None:
    run, processes = interrupted(tmp_path, lambda sweep: os.kill(sweep, signal.SIGKILL))
    assert run.returncode == -signal.SIGKILL
    assert [process for process in processes if is_running(process)] == []
    assert all(read(path.parent)["global_step"] >= 1 for path in tmp_path.glob("*/config.yaml"))
