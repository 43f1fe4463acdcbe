import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO, Checkpoint, steps_to_next_poll
from ldm.callbacks.checkpointing.interruption import SIGNALS
from tests.callbacks.ranks import train_on_two
from tests.callbacks.tiny import Batches, Tiny, trainer


class Kick(Callback):
    """Sends signals to this process when the given batch starts."""

    def __init__(self, batch: int, *signals: signal.Signals) -> None:
        self.batch, self.signals = batch, signals

    def on_train_batch_start(self, _: Any, __: Any, ___: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            for number in self.signals:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_the_step_and_resuming_is_exact(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    straight, resumed = Tiny(), Tiny()
    trainer(tmp_path, max_steps=9).fit(straight, Batches())
    with pytest.raises(SystemExit) as stopped:
        trainer(tmp_path, Checkpoint(tmp_path), Kick(3, number), max_steps=9).fit(Tiny(), Batches())
    assert stopped.value.code == 128 + number
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last == f"stopped by {number.name} after step 4: to continue, resume with resume={tmp_path}/last.ckpt"
    trainer(tmp_path, max_steps=9).fit(resumed, Batches(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(resumed.weights(), straight.weights())


def test_a_signal_does_not_save_a_partially_accumulated_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, Checkpoint(tmp_path), Kick(3, signal.SIGTERM), accumulate_grad_batches=3)
    with pytest.raises(SystemExit):
        run.fit(Tiny(), Batches())
    checkpoint = AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["global_step"] == 2
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 6


def test_a_signal_in_the_last_step_keeps_the_previous_checkpoint_and_names_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Validated(Tiny):
        def validation_step(self, batch: dict[str, Any], _: int) -> None: ...

    run = trainer(tmp_path, Checkpoint(tmp_path, every_n_train_steps=2), Kick(3, signal.SIGTERM), val_check_interval=4)
    with pytest.raises(SystemExit):
        run.fit(Validated(), Batches(), Batches())
    last = capfd.readouterr().err.strip().splitlines()[-1]
    where = "in the validation after the last step, 4; the checkpoint of step 2 is kept"
    assert last == f"stopped by SIGTERM {where}: to continue, resume with resume={tmp_path}/last.ckpt"
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2


def test_a_second_signal_stops_immediately_without_saving(tmp_path: Path) -> None:
    twice = signal.SIGINT, signal.SIGINT
    with pytest.raises(SystemExit) as stopped:
        trainer(tmp_path, Checkpoint(tmp_path), Kick(1, *twice)).fit(Tiny(), Batches())
    assert stopped.value.code == 130 and not (tmp_path / "last.ckpt").exists()


def test_a_signal_after_the_last_step_stops_immediately(tmp_path: Path) -> None:
    class Long(Callback):
        def on_train_end(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal was ignored")

    with pytest.raises(SystemExit):
        trainer(tmp_path, Checkpoint(tmp_path), Long()).fit(Tiny(), Batches())


@pytest.mark.parametrize("signals", [(), (signal.SIGUSR1,)])
def test_the_previous_signal_handlers_are_restored_after_the_run(
    tmp_path: Path, signals: tuple[signal.Signals]
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        trainer(tmp_path, Checkpoint(tmp_path), Kick(1, *signals)).fit(Tiny(), Batches())
    except SystemExit:
        assert signals
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_worker_processes_ignore_signals_sent_to_the_process_group(tmp_path: Path) -> None:
    class Forking(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if (child := os.fork()) == 0:
                os.kill(os.getpid(), signal.SIGINT)
                os._exit(7)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    statuses: list[int] = []
    run = trainer(tmp_path, Checkpoint(tmp_path), Forking())
    run.fit(Tiny(), Batches())
    assert statuses == [7] * 4


@pytest.mark.slow
def test_an_interrupted_process_prints_how_to_resume_in_one_line(tmp_path: Path) -> None:
    script = (
        "import time\n"
        "from pathlib import Path\n"
        "from ldm.callbacks.checkpointing.checkpoint import Checkpoint\n"
        "from tests.callbacks.tiny import Batches, Tiny, trainer\n"
        "class Slow(Tiny):\n"
        "    def on_train_batch_end(self, *_):\n"
        "        print('batch', flush=True)\n"
        "        time.sleep(0.05)\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "trainer(folder, Checkpoint(folder), max_steps=100_000).fit(Slow(), Batches())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    while process.stdout.readline() != "batch\n":
        assert process.poll() is None
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT
    assert f"resume={tmp_path}/last.ckpt" in stderr
    assert "Traceback" not in stderr and "graceful" not in stderr
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["global_step"] >= 1


def test_a_signal_to_one_rank_saves_after_the_step_and_ends_all_ranks(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        callbacks = Checkpoint(tmp_path), *([Kick(2, signal.SIGTERM)] if rank == 1 else [])
        run = trainer(tmp_path, *callbacks, devices=2, strategy="ddp", use_distributed_sampler=False, max_steps=9)
        run.fit(Tiny(), Batches())

    codes, stderr = train_on_two(tmp_path, work)
    assert codes == [128 + signal.SIGTERM] * 2
    assert "stopped by SIGTERM after step 3" in stderr
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


def test_ranks_on_gpus_agree_on_signals_about_once_per_second_and_on_cpus_in_every_step() -> None:
    assert [steps_to_next_poll(seconds, torch.device("cuda")) for seconds in (0.0, 0.25, 1.0, 30.0)] == [1000, 4, 1, 1]
    assert steps_to_next_poll(0.25, torch.device("cpu")) == 1
