"""Opens the log of a run before training starts."""

import os
import platform
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.callbacks.monitoring.log_file import LOG, LogFile
from ldm.errors import EXPECTED


class EarlyLog(Callback):
    """Opens the `file` of rank 0 in set-up, so that a run that is killed there leaves a log; a refused run leaves none.

    It comes after RunLock, which creates the folder, and Outcome, by whose record the folder is known to be a run's.
    """

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self._started = False

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.file.open(trainer.global_rank)
            LOG.info(f"setting up: process {os.getpid()} on {platform.node()}")

    def on_train_start(self, *_: Any) -> None:
        self._started = True

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero and not self._started and isinstance(exception, EXPECTED):
            self.file.withdraw()
