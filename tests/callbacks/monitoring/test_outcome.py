import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.checkpointing.interruption import stopped_at_once
from ldm.callbacks.checkpointing.run_lock import RunLock
from ldm.callbacks.monitoring.outcome import Outcome
from ldm.files import lock
from ldm.report.runs import read_run
from tests.callbacks.tiny import Batches, Tiny, trainer


class At(Callback):
    """Calls a function at the end of a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action()


def fail() -> None:
    raise ValueError("the data are gone:\n give others")


def train(folder: Path, *callbacks: Callback, **how: Any) -> dict[str, Any]:
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 4}}))
    trainer(folder, Outcome(folder), *callbacks, **how).fit(Tiny(), Batches())
    return recorded(folder)


def recorded(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return {key: record[key] for key in ("state", "step", "reason")}


def test_a_finished_run_is_recorded_and_shown_as_finished(tmp_path: Path) -> None:
    assert train(tmp_path) == {"state": "finished", "step": 4, "reason": None}
    (tmp_path / "unet.safetensors").touch()
    assert read_run(tmp_path).state == "finished"


def test_a_finished_run_without_metrics_and_exported_weights_is_shown_as_finished(tmp_path: Path) -> None:
    train(tmp_path)
    assert (read_run(tmp_path).state, read_run(tmp_path).note) == ("finished", "no metrics were measured")
    (tmp_path / "metrics.json").write_text(json.dumps({"metrics": {}, "provenance": {"steps": 2}}))  # of a shorter run
    assert read_run(tmp_path).state == "finished"


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"state": "running", "step": null}', '{"state": "running", "step": "3"}']
)
def test_a_run_continues_with_a_corrupt_record(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    assert train(tmp_path) == {"state": "finished", "step": 4, "reason": None}


def test_an_early_stop_is_recorded_and_shown_with_its_reason(tmp_path: Path) -> None:
    class Constant(Tiny):
        def validation_step(self, *_: object) -> None:
            self.log("val/loss", 1.0, batch_size=1)

    stop = EarlyStopping("val/loss", patience=1)
    run = trainer(tmp_path, Outcome(tmp_path), stop, max_steps=9, val_check_interval=2)
    run.fit(Constant(), Batches(), Batches())
    record = recorded(tmp_path)
    assert (record["state"], record["step"]) == ("finished", 4)
    assert record["reason"].startswith("stopped early: Monitored metric val/loss did not improve")
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "unet.safetensors").touch()
    assert read_run(tmp_path).note.startswith("stopped early: Monitored metric val/loss")


def test_a_stop_by_a_signal_is_recorded_and_shown(tmp_path: Path) -> None:
    at = At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(tmp_path, at, Checkpoint(tmp_path / "checkpoints"))
    assert recorded(tmp_path) == {"state": "stopped", "step": 2, "reason": "by SIGTERM"}
    run = read_run(tmp_path)
    assert (run.state, run.note) == ("stopped", "step 2 of 4, by SIGTERM; continue with resume=auto")


def test_a_failure_is_recorded_and_shown_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data are gone"):
        train(tmp_path, At(3, fail))
    assert recorded(tmp_path) == {"state": "failed", "step": 3, "reason": "the data are gone: give others"}
    (tmp_path / "log.txt").touch()
    run = read_run(tmp_path)
    assert run.state == "failed" and run.note.startswith("step 3 of 4: the data are gone: give others; see log.txt")


def test_a_failure_after_training_is_not_shown_as_finished(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_fit_end(self, *_: Any) -> None:
            raise OSError("no space for the weights")

    (tmp_path / "metrics.json").write_text(json.dumps({"metrics": {}, "provenance": {"steps": 4}}))
    with pytest.raises(OSError, match="no space"):
        train(tmp_path, Breaks())
    assert read_run(tmp_path).state == "failed"


def test_a_killed_run_is_shown_as_failed(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        train(tmp_path, At(2, lambda: {}["the process is killed here"]), Mute())
    assert recorded(tmp_path)["state"] == "running"
    (tmp_path / ".lock").touch()
    run = read_run(tmp_path)
    assert run.state == "failed" and "ended without a message (killed, out of memory or power)" in run.note


class Mute(Callback):
    """Undoes the record of a failure, which a killed process does not write."""

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        outcome = next(one for one in trainer.callbacks if isinstance(one, Outcome))  # type: ignore[attr-defined]
        outcome._write(trainer, "running")


def test_a_live_run_without_a_batch_for_long_is_shown_as_stalled(tmp_path: Path) -> None:
    states = []

    def look() -> None:
        states.append(read_run(tmp_path).state)
        os.utime(tmp_path / "state.json", (time.time() - 3600,) * 2)
        states.append(read_run(tmp_path).state)

    held = lock(tmp_path)
    train(tmp_path, At(2, look), max_steps=3)
    os.close(held)
    assert states == ["in progress", "stalled"]


def test_a_resumed_run_is_recorded_as_running_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data are gone"):
        train(tmp_path, At(3, fail))
    assert train(tmp_path) == {"state": "finished", "step": 4, "reason": None}


class AtFitStart(Callback):
    def __init__(self, action: Any) -> None:
        self.action = action

    def on_fit_start(self, *_: Any) -> None:
        self.action()


def start(folder: Path, action: Any, error: type[BaseException]) -> dict[str, Any]:
    """Trains with an action in set-up that raises an error, and returns the record."""
    with pytest.raises(error):
        trainer(folder, Outcome(folder), AtFitStart(action)).fit(Tiny(), Batches())
    return recorded(folder)


def test_a_run_that_is_killed_before_training_is_shown_as_failed(tmp_path: Path) -> None:
    records = []

    def look() -> None:
        records.append((tmp_path / "state.json").read_text())
        raise KeyError

    start(tmp_path, look, KeyError)
    (tmp_path / "state.json").write_text(records[0])
    assert recorded(tmp_path)["state"] == "starting"
    run = read_run(tmp_path)
    assert run.state == "failed" and run.note.startswith("before its first logged step, last wrote")
    assert "ended without a message (killed, out of memory or power)" in run.note


def test_a_signal_before_training_is_recorded_and_shown(tmp_path: Path) -> None:
    with stopped_at_once():
        record = start(tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit)
    assert record == {"state": "stopped", "step": 0, "reason": "by SIGTERM"}
    assert read_run(tmp_path).note == "before its first logged step, by SIGTERM; continue with resume=auto"


def test_an_unexpected_error_before_training_is_recorded_and_shown(tmp_path: Path) -> None:
    record = start(tmp_path, lambda: {}["missing"], KeyError)
    assert record == {"state": "failed", "step": 0, "reason": "KeyError: 'missing'"}
    assert read_run(tmp_path).note.startswith("before its first logged step: KeyError: 'missing'; ")


def test_a_run_that_failed_before_training_can_be_started_again_in_its_folder(tmp_path: Path) -> None:
    start(tmp_path, lambda: {}["missing"], KeyError)
    RunLock(tmp_path, "auto")
    RunLock(tmp_path)


def test_a_resumed_run_that_is_refused_keeps_its_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data are gone"):
        train(tmp_path, At(3, fail))
    before = (tmp_path / "state.json").read_bytes()
    assert start(tmp_path, fail, ValueError)["step"] == 3
    assert (tmp_path / "state.json").read_bytes() == before


def test_a_run_that_is_refused_before_training_leaves_no_record(tmp_path: Path) -> None:
    class Refuses(Callback):
        def on_fit_start(self, *_: Any) -> None:
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        trainer(tmp_path, Outcome(tmp_path), Refuses()).fit(Tiny(), Batches())
    assert not (tmp_path / "state.json").exists()
