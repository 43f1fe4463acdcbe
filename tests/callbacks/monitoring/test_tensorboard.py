import errno
import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from ldm.callbacks.monitoring.tensorboard import CompleteRecords, TensorBoard
from tests.callbacks.tiny import Batches, Tiny, trainer
from tests.small_disk import fill, small_disk


def steps(folder: Path, tag: str) -> list[int]:
    events = EventAccumulator(str(folder)).Reload()
    return [event.step for event in events.Tensors(tag)]


def logged(logger: TensorBoard, numbers: range) -> None:
    for number in numbers:
        logger.log_metrics({"loss": number}, number)
    logger.save()


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    logged(TensorBoard(tmp_path, name="tensorboard", version=""), range(10))
    resumed = TensorBoard(tmp_path, name="tensorboard", version="")
    resumed.resume(6)
    logged(resumed, range(6, 12))
    assert steps(tmp_path / "tensorboard", "loss") == [*range(12)]


def test_a_full_disk_costs_only_the_values_logged_meanwhile(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        logger = TensorBoard(disk, name="tensorboard", version="")
        logged(logger, range(3))
        filler = fill(disk)
        with pytest.warns(UserWarning, match="because the disk is full: training continues") as caught:
            logged(logger, range(3, 500))
        assert len(caught) == 1
        filler.unlink()
        with pytest.warns(UserWarning, match=r"is written again; \d+ values were lost"):
            logged(logger, range(500, 503))
        logger.finalize("success")
        found = steps(disk / "tensorboard", "loss")
    lost = found.index(500)
    assert found[:lost] == [*range(lost)] and lost < 500 and found[lost:] == [500, 501, 502]


def test_a_log_that_is_started_on_a_full_disk_begins_once_there_is_space(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        filler = fill(disk)
        logger = TensorBoard(disk, name="tensorboard", version="")
        with pytest.warns(UserWarning) as caught:
            logger.log_hyperparams({"lr": 0.1}, {"loss": 0.0})
            logger.resume(1)
            logged(logger, range(3))
        assert sum("cannot be started because the disk is full" in str(warning.message) for warning in caught) == 1
        filler.unlink()
        logged(logger, range(3, 6))
        logger.finalize("success")
        assert steps(disk / "tensorboard", "loss") == [3, 4, 5]


def test_training_continues_with_its_log_on_a_full_disk(tmp_path: Path) -> None:
    class Logging(Tiny):
        def on_train_batch_end(self, *_: object) -> None:
            self.logger.log_metrics({f"value {k}": 1.0 for k in range(1000)}, self.global_step)  # type: ignore[union-attr]

    with small_disk(tmp_path / "disk") as disk, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(tmp_path, logger=TensorBoard(disk, name="tensorboard", version=""))
        run.fit(Logging(), Batches())
    assert run.global_step == 4
    assert sum("because the disk is full" in str(warning.message) for warning in caught) == 1


def test_other_errors_than_a_full_disk_are_raised(tmp_path: Path) -> None:
    def write(record: bytes) -> None:
        raise PermissionError(errno.EACCES, "not yours")

    (tmp_path / "events").touch()
    with pytest.raises(PermissionError):
        CompleteRecords(str(tmp_path / "events"), write)(b"record")
