"""Limits how long one process may train."""

import math
import re

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

UNITS = 86400, 3600, 60, 1


class TimeLimit(Callback):
    """Limits the training time of each process to `duration` (DD:HH:MM:SS), like the time limit of a cluster job.

    The Checkpoint callback enforces it: it finishes the step, saves, and exits with TIMEOUT, so that resume=auto
    continues. Time before and after training and in earlier processes does not count.
    """

    def __init__(self, duration: str) -> None:
        match = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", str(duration))
        if match is None:
            raise ValueError(
                f"trainer.max_time is {duration}, but must give days, hours, minutes and seconds as DD:HH:MM:SS"
            )
        self.seconds = sum(int(digits) * unit for digits, unit in zip(match.groups(), UNITS, strict=True))

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if not any(isinstance(callback, Checkpoint) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "trainer.max_time stops a run so that it can be resumed, which requires callbacks.checkpoint: keep "
                "that callback, or leave out trainer.max_time"
            )


def time_limit(trainer: Trainer) -> float:
    """Returns the seconds that this process may train; infinity without a limit."""
    limits = [callback.seconds for callback in trainer.callbacks if isinstance(callback, TimeLimit)]  # type: ignore[attr-defined]
    return min(limits, default=math.inf)
