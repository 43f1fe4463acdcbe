"""Finds out whether the end of a data loader's worker caused a failure."""

import signal
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.errors import worker_failure


class Workers(Callback):
    """Makes the end of a data loader's worker the cause of the error in which it results, such as a lost connection.

    It comes before the callbacks that record a failure: torch raises the end of a worker from a handler of SIGCHLD,
    which may interrupt them.
    """

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if not isinstance(exception, Exception) or worker_failure(exception):
            return
        check: Any = torch._C._error_if_any_worker_fails
        try:
            check()
        except RuntimeError as end:
            exception.__cause__ = end
