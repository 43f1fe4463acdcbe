"""How far a training is, how fast, and how long it still takes."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from ldm import progress
from ldm.callbacks.find import find
from ldm.callbacks.monitoring.throughput import Throughput

LOSS = "train/loss"


class Progress(ProgressBar):
    """Optimizer steps, images a second, the step's loss and time left.

    Speed and loss are as the loggers get them: training alone since they were last shown, without validation or
    drawing, where a Throughput measures it, and the mean over the global batch of the step that is shown.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._shown: progress.Progress | None = None
        self._last = (0, 0.0)  # images and seconds of training when the line was last shown

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._enabled:
            total = int(trainer.estimated_stepping_batches)
            self._shown = progress.Progress(total, "steps", "training: ", trainer.global_step, self.seconds)
            self._last = _trained(trainer)

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
        """Nothing where nobody measures it."""
        (images, seconds), self._last = self._last, _trained(trainer)
        if self._last[1] > seconds:
            yield f"{(self._last[0] - images) / (self._last[1] - seconds):.4g} images/s"
        if LOSS in trainer.callback_metrics:
            yield f"loss {trainer.callback_metrics[LOSS]:.4f}"

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()

    def print(self, *values: Any, sep: str = " ", **_: Any) -> None:
        """What Trainer.print calls, so as not to break the line."""
        progress.clear()
        print(sep.join(map(str, values)), flush=True)

    def _close(self) -> None:
        progress.clear()
        self._shown = None


def _trained(trainer: Trainer) -> tuple[int, float]:
    """Images and seconds of training so far."""
    speed = find(trainer, Throughput)
    return (0, 0.0) if speed is None else (speed.images, speed.seconds)
