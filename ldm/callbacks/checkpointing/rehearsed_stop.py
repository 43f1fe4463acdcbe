"""Stops a rehearsed run as a cluster would, by a signal to one of its processes."""

import os
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.callbacks.steps import stepped

STOP = signal.SIGUSR1  # which SLURM sends before the end of a job, with --signal=USR1@120


class RehearsedStop(Callback):
    """Sends STOP to the process of the last rank at the end of `step`; a run that resumes there does not stop again."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = trainer.global_rank == trainer.world_size - 1
        if last and trainer.global_step == self.step and stepped(trainer, batch_idx):
            os.kill(os.getpid(), STOP)
