"""Shows training progress: steps, speed, loss and remaining time."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from ldm import progress
from ldm.callbacks.find import find
from ldm.callbacks.monitoring.throughput import Throughput

LOSS = "train/loss"


class Progress(ProgressBar):
    """Shows optimizer steps, images per second, the step's loss and the time left.

    Speed and loss are those that the loggers get: the speed is of training alone, without validation and sampling,
    since it was last shown (if there is a Throughput callback), and the loss is the mean over the step's global batch,
    or over this rank's part of it in a step that is not logged.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._shown: progress.Progress | None = None
        self._last = (0, 0.0)  # training images and seconds when the line was last shown

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._enabled:
            total = int(trainer.estimated_stepping_batches)
            self._shown = progress.Progress(total, "steps", "training: ", trainer.global_step, self.seconds)
            self._last = _images_and_seconds(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        shown = self._shown
        if shown is None:
            return
        stepped, shown.done = trainer.global_step != shown.done, trainer.global_step
        if stepped and shown.due():
            shown.show(", ".join(self._notes(trainer)))

    def _notes(self, trainer: Trainer) -> Iterator[str]:
        """Yields the speed and the loss, each only if it is measured."""
        (images, seconds), self._last = self._last, _images_and_seconds(trainer)
        if self._last[1] > seconds:
            yield f"{(self._last[0] - images) / (self._last[1] - seconds):.4g} images/s"
        if LOSS in trainer.callback_metrics:
            yield f"loss {trainer.callback_metrics[LOSS]:.4f}"

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()

    def print(self, *values: Any, sep: str = " ", **_: Any) -> None:
        """Prints below a cleared progress line; Trainer.print calls this."""
        progress.clear()
        print(sep.join(map(str, values)), flush=True)

    def _close(self) -> None:
        progress.clear()
        self._shown = None


def _images_and_seconds(trainer: Trainer) -> tuple[int, float]:
    """Returns the images and seconds of training so far."""
    speed = find(trainer, Throughput)
    return (0, 0.0) if speed is None else (speed.images, speed.seconds)
