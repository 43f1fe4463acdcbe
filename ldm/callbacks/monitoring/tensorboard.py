"""Logs to TensorBoard without ending the training when the disk is full."""

import os
import tempfile
import warnings
from datetime import datetime
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

from ldm.callbacks.full_disk import is_disk_full, tolerate_full_disk

HEADER = 4096  # bytes that must be free to start a file; its first record takes about 100


class TensorBoard(TensorBoardLogger):
    """A TensorBoardLogger that loses only what it logs while the disk is full."""

    _warned = False  # that the log cannot be started

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """Returns the SummaryWriter, which is created by the first access; while the disk is full, a stand-in."""
        new = self._experiment is None
        if new and not self._can_start():
            return cast(SummaryWriter, Ignoring())
        writer: SummaryWriter = super().experiment
        if new:
            events: Any = writer._get_file_writer().event_writer
            events.flush()  # the header, without which TensorBoard cannot read the file
            file = events._general_file_writer
            file.write = CompleteRecords(events._file_name, file.write)
        return writer

    def _can_start(self) -> bool:
        """Returns whether a file can be started. TensorBoard's thread would end with an error if it does not fit."""
        try:
            os.makedirs(self.log_dir, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.log_dir) as probe:
                probe.write(bytes(HEADER))
        except OSError as error:
            if not is_disk_full(error):
                raise
            if not self._warned:
                warnings.warn(
                    f"TensorBoard's log in {self.log_dir} cannot be started because the disk is full: training "
                    "continues, and what it would have shown is lost until there is space",
                    stacklevel=2,
                )
            self._warned = True
            return False
        return True

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Hides the values of steps, counted from 0, that a run which has completed `step` steps repeats.

        TensorBoard discards earlier values when it reads that another session starts at a step. It ignores the first
        start that it reads, which may be this one, so that the start is written twice.
        """
        start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
        for _ in range(2):
            cast(SummaryWriter, self.experiment)._get_file_writer().add_event(start)

    def save(self) -> None:
        with tolerate_full_disk("TensorBoard's log"):
            super().save()


class Ignoring:
    """Accepts every call, in place of a SummaryWriter and its parts."""

    def __getattr__(self, name: str) -> "Ignoring":
        return self

    def __call__(self, *_: Any, **__: Any) -> "Ignoring":
        return self


class CompleteRecords:
    """Writes records with `write`; one that does not fit on the disk is removed again, because it would be corrupt.

    TensorBoard's own thread calls it, and would end with an exception that the next logged value raises.
    """

    def __init__(self, path: str, write: Any) -> None:
        self.path, self.write = path, write
        self._lost = 0  # records since the disk became full

    def __call__(self, record: bytes) -> None:
        end = os.path.getsize(self.path)
        try:
            self.write(record)
        except OSError as error:
            if not is_disk_full(error):
                raise
            os.truncate(self.path, end)
            if not self._lost:
                warnings.warn(
                    f"{self.path} is not written since {datetime.now():%H:%M:%S} because the disk is full: training "
                    "continues, and what TensorBoard would have shown is lost until there is space",
                    stacklevel=2,
                )
            self._lost += 1
            return
        if self._lost:
            warnings.warn(f"{self.path} is written again; {self._lost} values were lost", stacklevel=2)
        self._lost = 0
