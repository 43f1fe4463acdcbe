"""Ctrl-C, SIGTERM and SIGUSR1 end a run with a checkpoint instead of a loss."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ldm.callbacks.steps import ending, stepped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption(Checkpoint):
    """On a signal: finish the step, save `folder`/last.ckpt, say how to go on, exit with 128 + the signal.

    It does not matter which rank gets the signal. A second signal, and any after the last step, exits at
    once. A `Checkpoint` only so that Lightning runs it after all that changes weights or averages.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.interrupted_by: str | None = None
        self._training = False
        self._process = os.getpid()
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.interrupted_by, self._training, self._process = None, True, os.getpid()
        self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not stepped(trainer, batch_idx):  # half-accumulated gradients would be lost
            return
        if trainer.strategy.reduce_boolean_decision(self.interrupted_by is not None, all=False):
            self._stop(trainer)
        self._training = not ending(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _stop(self, trainer: Trainer) -> None:
        self.interrupted_by = self.interrupted_by or signal.SIGTERM.name  # another rank's signal
        trainer.save_checkpoint(self.path, weights_only=False)
        if trainer.is_global_zero:
            _say(
                f"stopped by {self.interrupted_by} after step {trainer.global_step}: "
                f"resume={self.path} goes on from there"
            )
        raise SystemExit(128 + signal.Signals[self.interrupted_by])

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, which works on until the run ends
            return
        name = signal.Signals(number).name
        if self.interrupted_by or not self._training:
            _say(f"{name}: stopped at once")
            raise SystemExit(128 + number)
        self.interrupted_by = name
        _say(f"{name}: saving a checkpoint after this step; a second signal stops at once")


def _say(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())  # print must not be called within a handler
