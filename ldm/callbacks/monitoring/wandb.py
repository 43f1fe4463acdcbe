"""Logs to Weights & Biases without ending the training when the disk is full."""

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ldm.callbacks.full_disk import is_disk_full

LEAST = 1 << 16  # free bytes below which W&B's process, which writes such blocks, may have failed to write


class Wandb(WandbLogger):
    """A WandbLogger that warns once when the disk is full: W&B's process then writes nothing more, without a message.

    wandb also logs its own work to a file, and would print a traceback for each message that cannot be written.
    """

    _lost = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)
        except OSError as error:
            if not is_disk_full(error):
                raise
            self._warn()
        if not self._lost:
            disk = os.statvfs(self.experiment.dir)
            if disk.f_bavail * disk.f_frsize < LEAST:
                self._warn()
            self._silence()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        try:
            super().finalize(status)
        except OSError as error:
            if not is_disk_full(error):
                raise
            self._warn()

    def _warn(self) -> None:
        if not self._lost:
            self._lost = True
            warnings.warn(
                "the log of Weights & Biases may end here because the disk is full: training continues, and "
                "metrics.csv gets what fits; free some disk space, and resume the run to log to Weights & Biases again",
                stacklevel=3,
            )

    def _silence(self) -> None:
        for handler in logging.getLogger("wandb").handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _ignore  # type: ignore[method-assign]


def _ignore(record: Any) -> None:
    """Replaces printing the traceback of a message that could not be written; the Wandb logger warns instead."""
