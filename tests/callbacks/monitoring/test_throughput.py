import warnings
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from torch import Tensor

from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.monitoring.scalar_table import ScalarTable
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.report.runs import read_scalars
from tests.callbacks.logged import Logged
from tests.callbacks.ranks import train_on_two
from tests.callbacks.tiny import Batches, Tiny, trainer


@pytest.fixture(autouse=True)
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by one second at each reading."""
    seconds = count()
    monkeypatch.setattr("ldm.callbacks.monitoring.throughput.time.perf_counter", lambda: float(next(seconds)))


def test_speed_and_data_wait_are_measured_over_work_and_waiting(
    tmp_path: Path,
) -> None:
    logger, speed = Logged(), Throughput()
    trainer(tmp_path, speed, logger=logger, log_every_n_steps=2).fit(Tiny(), Batches())
    assert (speed.images, speed.seconds, speed.waited) == (8, 7, 3)  # waiting for the first batch does not count
    assert logger.rows[3]["train/images_per_second"] == 1
    assert logger.rows[3]["train/data_wait"] == 0.5


def test_time_after_a_pause_is_not_counted(tmp_path: Path) -> None:
    class Pausing(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            speed.pause()

    speed = Throughput()
    trainer(tmp_path, speed, Pausing()).fit(Tiny(), Batches())
    assert (speed.seconds, speed.waited) == (4, 0)


def test_copying_a_checkpoint_does_not_count_as_waiting_for_data(tmp_path: Path) -> None:
    speed = Throughput()
    trainer(tmp_path, speed, Checkpoint(tmp_path, every_n_train_steps=2)).fit(Tiny(), Batches())
    assert (speed.seconds, speed.waited) == (9, 3)  # two readings more than without checkpoints, one per copy


def test_validation_time_is_not_counted(tmp_path: Path) -> None:
    class Validated(Tiny):
        def validation_step(self, *_: Any) -> None:
            pass

    speed = Throughput()
    trainer(tmp_path, speed, val_check_interval=2).fit(Validated(), Batches(), Batches())
    assert (speed.seconds, speed.waited) == (6, 2)  # without the wait for the third batch, which follows a validation


class Laps(Throughput):
    """Counts fixed seconds for each wait and each batch."""

    def __init__(self, wait: float, work: float) -> None:
        super().__init__()
        self.laps = cycle((wait, work))

    def _lap(self) -> float:
        self.seconds += (lap := next(self.laps))
        return lap


def test_data_wait_is_that_of_the_rank_that_waits_longest(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        speed = Laps(3, 1) if rank else Laps(1, 3)
        how = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        trainer(tmp_path, speed, logger=ScalarTable(tmp_path), max_steps=2, **how).fit(Tiny(), Batches())

    codes, stderr = train_on_two(tmp_path, work)
    assert codes == [0, 0], stderr
    scalars = read_scalars(tmp_path)
    assert scalars["train/data_wait"].values == [0.75, 0.75]
    assert scalars["train/images_per_second"].values == [1, 1]  # two images per rank in four seconds


def test_a_resumed_run_continues_the_counts(tmp_path: Path) -> None:
    logger, last = Logged(), tmp_path / "last.ckpt"
    for steps, resume in ((2, None), (4, last)):
        speed = Laps(1, 3)
        run = trainer(tmp_path, speed, Checkpoint(tmp_path), logger=logger, max_steps=steps)
        run.fit(Tiny(), Batches(), ckpt_path=resume)
    assert (speed.images, speed.waited) == (8, 4)
    assert list(logger.curve("train/images_per_second").values()) == [0.5] * 4


def test_waiting_beyond_the_alarm_warns_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="rank 0 spends .* waiting for data") as caught:
        trainer(tmp_path, Throughput(alarm=0.4, window=2), max_steps=6).fit(Tiny(), Batches())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(tmp_path, Throughput(alarm=0.6, window=2)).fit(Tiny(), Batches())
    assert len([warning for warning in caught if "waiting for data" in str(warning.message)]) == 1


@pytest.mark.parametrize(("content", "advised"), [("image", True), ("moments", False)])
def test_only_a_run_on_images_is_advised_to_cache_its_latents(tmp_path: Path, content: str, advised: bool) -> None:
    class Content(Batches):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield from ({**batch, content: batch["x"]} for batch in super().__iter__())

    with pytest.warns(UserWarning, match="raise data.workers") as caught:
        trainer(tmp_path, Throughput(alarm=-1, window=0)).fit(Tiny(), Content())
    assert any("ldm encode" in str(warning.message) for warning in caught) == advised
