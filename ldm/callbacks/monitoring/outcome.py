"""Records in a run's folder whether it is running, has finished, was stopped or failed, and why."""

import json
import os
import platform
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from ldm.callbacks.checkpointing.interruption import SIGNALS, TIMEOUT, stop_cause
from ldm.callbacks.find import find
from ldm.callbacks.monitoring.watchdog import Watchdog
from ldm.errors import EXPECTED, worker_failure
from ldm.files import write_bytes, write_json

FILE = "state.json"
PULSE = 30.0  # seconds between two marks of progress


class Outcome(Callback):
    """Writes `folder`/state.json: "state" is starting, running, finishing (after training), finished, stopped, failed.

    It also has the "step", the "reason" of a stop, a failure or an early end, "time", "host" and "process". The file's
    modification time is that of the last batch, at intervals of PULSE, so that `ldm status` recognises a stalled run.
    A failure on any rank is recorded, and the first one is kept. A file that cannot be written does not fail the run.
    A run that is refused, by an error of its input before training starts, leaves the file as it was.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE
        self._started = False
        self._touched = 0.0
        self._before: bytes | None = None  # the file, if this process has replaced it before training
        self._step = 0  # of the last record, until training starts

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._before = self.path.read_bytes() if self.path.is_file() else None
            step = self._recorded().get("step")
            self._step = step if isinstance(step, int) else 0
            self._write(trainer, "starting")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._started = True
        if trainer.is_global_zero:
            self._write(trainer, "running")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._pulse(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._pulse(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._write(trainer, "finishing", _early_end(trainer))

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._write(trainer, "finished", _early_end(trainer) if self._started else self._recorded().get("reason"))

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if not self._started and isinstance(exception, EXPECTED):
            return self._restore(trainer)
        if self._recorded().get("state") in (None, "failed"):
            return
        if cause := describe_stop(exception):
            if trainer.is_global_zero:
                self._write(trainer, "stopped", f"by {cause}")
            return
        if (watchdog := find(trainer, Watchdog)) and watchdog.failure:  # of a distributed run, perhaps of another rank
            return self._write(trainer, "failed", watchdog.failure.sentence)
        text = " ".join(str(exception).split())
        what = text if isinstance(exception, EXPECTED) and text else f"{type(exception).__name__}: {text}"
        what = worker_failure(exception) or what
        ranks = f"rank {trainer.global_rank} of {trainer.world_size}: " if trainer.world_size > 1 else ""
        self._write(trainer, "failed", f"{ranks}{what}")

    def _restore(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self._recorded().get("state") == "starting":
            with suppress(OSError):
                self.path.unlink() if self._before is None else write_bytes(self.path, self._before)

    def _write(self, trainer: Trainer, state: str, reason: str | None = None) -> None:
        about = {"host": platform.node(), "process": os.getpid()}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        step = trainer.global_step if self._started else max(self._step, trainer.global_step)
        with suppress(OSError):
            write_json(self.path, {"state": state, "step": step, "reason": reason, "time": now, **about})

    def _pulse(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and time.monotonic() - self._touched > PULSE:
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self.path)

    def _recorded(self) -> dict[str, Any]:
        """Returns the record; {} if there is none or it is corrupt."""
        try:
            record = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}


def describe_stop(exception: BaseException) -> str | None:
    """Returns the signal or setting that stopped a run; None for a failure."""
    if isinstance(exception, KeyboardInterrupt):
        return "SIGINT"
    code = exception.code if isinstance(exception, SystemExit) else None
    return stop_cause(code) if code in (TIMEOUT, *(128 + number for number in SIGNALS)) else None


def _early_end(trainer: Trainer) -> str | None:
    """Returns why training ended before its last step; None if it did not."""
    if not trainer.should_stop or trainer.global_step == trainer.max_steps:
        return None
    stopping = find(trainer, EarlyStopping)
    message = getattr(stopping, "stopping_reason_message", None)
    return f"stopped early: {' '.join(message.split())}" if message else "stopped early by a callback"
