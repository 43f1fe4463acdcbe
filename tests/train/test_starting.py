"""Tests what a user sees when a run ends before its first step, on one process and on two."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.report.runs import read_run
from tests.callbacks.ranks import free_port
from tests.runs import TINY
from tests.train.processes import ROOT, Run, finish, start
from tests.train.test_failing_ranks import TWO, process_of

SHORT = *TINY, "trainer.max_steps=1", "metrics=none", "callbacks.previews=null", "logger=none"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes of ranks in /proc")


def wait_for(condition: Callable[[], object], run: subprocess.Popen[str]) -> None:
    while not condition():
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)


def ended_in_set_up(folder: Path, number: signal.Signals, rank: int, *arguments: str) -> Run:
    """Sends a signal to a rank when the run has opened its log in set-up."""
    run = start(*arguments, "data.count=4096", f"run_dir={folder}")  # encoding takes seconds, enough for the signal
    wait_for((folder / "log.txt").exists, run)
    os.kill(process_of(rank, run.pid), number)
    return finish(run)


@pytest.mark.parametrize(
    ("number", "state"),
    [
        pytest.param(signal.SIGTERM, "stopped", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "failed", marks=pytest.mark.full_size),
    ],
)
def test_a_run_that_ends_in_set_up_is_shown_and_starts_again(
    tmp_path: Path, number: signal.Signals, state: str
) -> None:
    run = ended_in_set_up(tmp_path, number, 0, *SHORT)
    assert run.returncode in (128 + number, -number) and "Traceback" not in run.stderr
    assert "SIGTERM: stopped before training" in run.stderr or number == signal.SIGKILL
    assert read_run(tmp_path).state == state
    assert "setting up: process" in (tmp_path / "log.txt").read_text()
    again = finish(start(*SHORT, "data.count=18", f"run_dir={tmp_path}", "resume=auto"))
    assert again.returncode == 0, again.stderr
    assert read_run(tmp_path).state == "finished"


@pytest.mark.parametrize(
    "killed", [pytest.param(0, marks=pytest.mark.full_size), pytest.param(1, marks=pytest.mark.slow)]
)
def test_a_rank_that_is_killed_in_set_up_ends_the_run_with_its_name(tmp_path: Path, killed: int) -> None:
    run = ended_in_set_up(tmp_path, signal.SIGKILL, killed, *TWO, "trainer.max_steps=1", "logger=none")
    assert f"error: rank {killed} of 2 (host " in run.stderr and "Traceback" not in run.stderr
    found = read_run(tmp_path)
    assert found.state == "failed" and f"rank {killed} of 2 (host " in found.note


@pytest.mark.full_size
def test_a_rank_that_is_killed_while_it_starts_ends_the_run_with_its_name(tmp_path: Path) -> None:
    run = start(*TWO, "trainer.max_steps=1", f"run_dir={tmp_path}/run")
    wait_for(lambda: process_of(1, run.pid) != run.pid, run)
    child = process_of(1, run.pid)
    os.kill(child, signal.SIGKILL)
    ended = finish(run)
    assert ended.returncode == 1
    assert f"error: rank 1 of 2 (process {child}) was killed by SIGKILL" in ended.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_run_that_waits_for_a_rank_that_never_starts_can_be_stopped(tmp_path: Path) -> None:
    port = free_port()
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    nodes = "trainer.num_nodes=2", "trainer.devices=1", "strategy=ddp", f"run_dir={tmp_path}/run"
    command = [sys.executable, "train.py", *SHORT, *nodes]
    run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True)
    wait_for(lambda: is_open(port), run)
    run.send_signal(signal.SIGTERM)
    ended = finish(run)
    assert ended.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM before training" in ended.stderr and not (tmp_path / "run").exists()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_host_of_rank_0_whose_name_is_unknown_is_named() -> None:
    environment = {**os.environ, "MASTER_ADDR": "rank-0.invalid", "NODE_RANK": "1"}
    command = [sys.executable, "train.py", *SHORT, "trainer.num_nodes=2", "trainer.devices=1", "strategy=ddp"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("error: the ranks are to meet on host rank-0.invalid, whose name this host cannot")


@pytest.mark.slow
def test_ctrl_c_while_the_program_is_imported_prints_one_line(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # else the run may ignore it, as these tests do
    run = start(*SHORT, f"run_dir={tmp_path}/run")
    signal.signal(signal.SIGINT, before)
    wait_for(lambda: b"_yaml" in Path(f"/proc/{run.pid}/maps").read_bytes(), run)  # which Hydra imports
    run.send_signal(signal.SIGINT)
    ended = finish(run)
    assert (ended.returncode, ended.stderr.strip()) == (130, "SIGINT: stopped before training")
