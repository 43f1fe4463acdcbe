import warnings
from itertools import count, cycle
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.report.runs import read_scalars
from tests.callbacks.logged import Logged
from tests.callbacks.ranks import train_on_two
from tests.callbacks.tiny import Batches, Tiny, trainer


@pytest.fixture(autouse=True)
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is one second later each time somebody looks."""
    seconds = count()
    monkeypatch.setattr("ldm.callbacks.monitoring.throughput.time.perf_counter", lambda: float(next(seconds)))


def test_batches_of_two_with_a_second_of_work_and_one_of_waiting_are_one_image_a_second(
    tmp_path: Path,
) -> None:
    logger, speed = Logged(), Throughput()
    trainer(tmp_path, speed, logger=logger, log_every_n_steps=2).fit(Tiny(), Batches())
    assert (speed.images, speed.seconds, speed.waited) == (8, 7, 3)  # nobody waited for the first batch
    assert logger.rows[3]["train/images_per_second"] == 1
    assert logger.rows[3]["train/data_wait"] == 0.5


def test_time_after_a_pause_is_not_counted(tmp_path: Path) -> None:
    class Pausing(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            speed.pause()

    speed = Throughput()
    trainer(tmp_path, speed, Pausing()).fit(Tiny(), Batches())
    assert (speed.seconds, speed.waited) == (4, 0)


def test_copying_a_checkpoint_is_no_waiting_for_data(tmp_path: Path) -> None:
    speed = Throughput()
    trainer(tmp_path, speed, Checkpoint(tmp_path, every_n_train_steps=2)).fit(Tiny(), Batches())
    assert (speed.seconds, speed.waited) == (9, 3)  # two more than without: after the second batch and the last


def test_validation_is_not_counted(tmp_path: Path) -> None:
    class Validated(Tiny):
        def validation_step(self, *_: Any) -> None:
            pass

    speed = Throughput()
    trainer(tmp_path, speed, val_check_interval=2).fit(Validated(), Batches(), Batches())
    assert (speed.seconds, speed.waited) == (6, 2)  # of the three waits, that for the third batch


class Laps(Throughput):
    """In which each wait and each batch take so many seconds."""

    def __init__(self, wait: float, work: float) -> None:
        super().__init__()
        self.laps = cycle((wait, work))

    def _lap(self) -> float:
        self.seconds += (lap := next(self.laps))
        return lap


def test_the_share_of_waiting_is_that_of_the_rank_that_waits_longest(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        speed = Laps(3, 1) if rank else Laps(1, 3)
        how = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        trainer(tmp_path, speed, logger=CSVLogger(tmp_path, "csv"), max_steps=2, **how).fit(Tiny(), Batches())

    codes, told = train_on_two(tmp_path, work)
    assert codes == [0, 0], told
    found = read_scalars(tmp_path)
    assert found["train/data_wait"].values == [0.75, 0.75]
    assert found["train/images_per_second"].values == [1, 1]  # two of each rank in four seconds


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    logger, last = Logged(), tmp_path / "last.ckpt"
    for steps, resume in ((2, None), (4, last)):
        speed = Laps(1, 3)
        run = trainer(tmp_path, speed, Checkpoint(tmp_path), logger=logger, max_steps=steps)
        run.fit(Tiny(), Batches(), ckpt_path=resume)
    assert (speed.images, speed.waited) == (8, 4)
    assert list(logger.curve("train/images_per_second").values()) == [0.5] * 4


def test_waiting_beyond_the_alarm_is_told_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="rank 0 waits for data") as told:
        trainer(tmp_path, Throughput(alarm=0.4, window=2), max_steps=6).fit(Tiny(), Batches())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(tmp_path, Throughput(alarm=0.6, window=2)).fit(Tiny(), Batches())
    assert len([one for one in told if "waits for data" in str(one.message)]) == 1
