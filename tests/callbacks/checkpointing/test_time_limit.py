import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO, Checkpoint
from ldm.callbacks.checkpointing.interruption import TIMEOUT
from ldm.callbacks.checkpointing.time_limit import TimeLimit
from tests.callbacks.ranks import train_on_two
from tests.callbacks.tiny import Batches, Tiny, trainer


class Slow(Callback):
    """Makes each step take at least a second."""

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(1.0)


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:00:00:05", 5), ("01:02:03:04", 93784), ("100:00:00:00", 8640000), ("00:00:90:00", 5400)]
)
def test_a_duration_is_days_hours_minutes_and_seconds(text: str, seconds: int) -> None:
    assert TimeLimit(text).seconds == seconds


@pytest.mark.parametrize("text", ["5", "10:00", "0:0:0:5", "00:00:00:-5", "", "an hour"])
def test_a_duration_in_another_format_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"trainer\.max_time is .*, but must give days, .* as DD:HH:MM:SS"):
        TimeLimit(text)


@pytest.mark.slow
def test_a_run_saves_and_exits_at_its_time_limit_and_resumes_exactly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    straight, resumed = Tiny(), Tiny()
    trainer(tmp_path, max_steps=4).fit(straight, Batches())
    last = tmp_path / "last.ckpt"
    for step in (1, 2, 3):
        run = trainer(tmp_path, Checkpoint(tmp_path), TimeLimit("00:00:00:01"), Slow(), max_steps=4)
        with pytest.raises(SystemExit) as stopped:
            run.fit(Tiny(), Batches(), ckpt_path=last if step > 1 else None)
        assert stopped.value.code == TIMEOUT == 124
        last_line = capfd.readouterr().err.strip().splitlines()[-1]
        assert last_line == f"stopped by trainer.max_time after step {step}: to continue, resume with resume={last}"
    run = trainer(tmp_path, Checkpoint(tmp_path), TimeLimit("00:00:00:01"), Slow(), max_steps=4)
    run.fit(resumed, Batches(), ckpt_path=last)  # the last step is not interrupted
    assert torch.equal(resumed.weights(), straight.weights())


def test_time_counted_by_lightning_in_an_older_checkpoint_is_ignored(tmp_path: Path) -> None:
    older = trainer(tmp_path, Checkpoint(tmp_path), Slow(), max_steps=2, max_time="00:01:00:00")
    older.fit(Tiny(), Batches())
    run = trainer(tmp_path, Checkpoint(tmp_path), TimeLimit("00:00:00:01"), max_steps=3)
    run.fit(Tiny(), Batches(), ckpt_path=tmp_path / "last.ckpt")
    assert run.global_step == 3


@pytest.mark.slow
def test_the_time_limit_does_not_save_a_partially_accumulated_step(tmp_path: Path) -> None:
    callbacks = Checkpoint(tmp_path), TimeLimit("00:00:00:01"), Slow()
    with pytest.raises(SystemExit):
        trainer(tmp_path, *callbacks, accumulate_grad_batches=3).fit(Tiny(), Batches())
    checkpoint = AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 3


def test_a_time_limit_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.max_time .* requires callbacks\.checkpoint"):
        trainer(tmp_path, TimeLimit("00:00:00:01")).fit(Tiny(), Batches())


@pytest.mark.slow
def test_the_time_limit_of_one_rank_ends_all_ranks(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        limit = TimeLimit("00:00:00:01" if rank == 1 else "01:00:00:00")
        run = trainer(
            *(tmp_path, Checkpoint(tmp_path), limit, Slow()),
            **{"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "max_steps": 9},
        )
        run.fit(Tiny(), Batches())

    codes, stderr = train_on_two(tmp_path, work)
    assert codes == [TIMEOUT] * 2
    assert "stopped by trainer.max_time after step 1" in stderr
