"""Tests the functions with which rehearsals start and kill commands."""

import sys
import time
from pathlib import Path

import pytest

from experiments.robustness.processes import Command, Wrong, descendants, is_alive

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
PARENT = "import subprocess, time; subprocess.Popen(['sleep', '60']); print('started'); time.sleep(60)"


def test_a_killed_command_takes_the_processes_that_it_started_along(tmp_path: Path) -> None:
    command = Command(["-c", PARENT], tmp_path / "log")
    command.wait_for(lambda: "started" in command.output, "the parent started")
    [child] = descendants(command.process.pid)
    command.kill()
    assert command.end() == -9
    deadline = time.monotonic() + 30  # the kernel removes a killed process some time after the signal
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def test_a_command_that_ends_before_what_is_waited_for_is_wrong(tmp_path: Path) -> None:
    command = Command(["-c", "raise SystemExit('no disk')"], tmp_path / "log")
    with pytest.raises(Wrong, match=r"ended with exit code 1 before it was done:\nno disk"):
        command.wait_for(lambda: False, "it was done")
