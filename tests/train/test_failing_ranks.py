"""Tests what a user sees when one of two processes fails, with Lightning's launcher and with torchrun."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.callbacks.ranks import free_port
from tests.runs import TINY
from tests.small_disk import small_disk
from tests.train.processes import ROOT, finish, start

TWO = (*TINY, "strategy=ddp", "trainer.devices=2", "data.batch_size=2", "metrics=none", "callbacks.previews=null")


def launched(launcher: str, *arguments: str) -> subprocess.Popen[str]:
    if launcher == "lightning":
        return start(*TWO, *arguments)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, "train.py", *TWO, *arguments], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def process_of(rank: int, parent: int) -> int:
    """Returns the process of a rank among a process and its children; Lightning's first process is rank 0."""
    children = [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    for process in children:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        if b"train.py" in Path(f"/proc/{process}/cmdline").read_bytes() and f"LOCAL_RANK={rank}".encode() in variables:
            return process
    return parent


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes of ranks in /proc")
@pytest.mark.parametrize(
    ("launcher", "killed"),
    [
        pytest.param("lightning", 0, marks=pytest.mark.full_size),
        pytest.param("lightning", 1, marks=pytest.mark.slow),
        pytest.param("torchrun", 0, marks=pytest.mark.full_size),
    ],
)
def test_the_last_line_names_the_rank_that_was_killed(tmp_path: Path, launcher: str, killed: int) -> None:
    forever = "trainer.max_steps=100000", "callbacks.checkpoint.every_n_train_steps=1"
    run = launched(launcher, f"run_dir={tmp_path}", *forever)
    while not (tmp_path / "checkpoints" / "last.ckpt").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    process = process_of(killed, run.pid)
    os.kill(process, signal.SIGKILL)
    stderr = finish(run).stderr
    [message] = re.findall("^error: .*", stderr, re.MULTILINE)
    assert run.returncode != 0
    assert f"rank {killed} of 2 (host " in message and f", process {process}) " in message
    assert "kill -9" in message or "killed by signal 9" in message
    if launcher == "lightning":  # torchrun prints a report of its own
        assert stderr.splitlines()[-1] == message and "Traceback" not in stderr
    else:
        assert f"traceback : {message.removeprefix('error: ')}" in stderr


@pytest.mark.full_size
def test_a_last_checkpoint_that_does_not_fit_fails_a_run_on_two_ranks(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", pages=64) as disk:
        run = finish(start(*TWO, "trainer.max_steps=2", f"run_dir={disk}/run"))
        assert not list((disk / "run").glob("checkpoints/.*"))
    assert run.returncode == 1
    assert "the last checkpoint, of step 2, was not saved because the disk is full" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
