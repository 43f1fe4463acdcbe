"""How far a training is, how fast, and how long it still takes."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

from ldm import progress
from ldm.callbacks.throughput import images_in


class Progress(ProgressBar):
    """Optimizer steps, images a second of all ranks, the loss (smoothed over 50 batches) and time left."""

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._shown: progress.Progress | None = None
        self._images = 0  # since the display was last shown
        self._loss: Tensor | None = None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._enabled:
            total = int(trainer.estimated_stepping_batches)
            self._shown = progress.Progress(total, "steps", "training: ", trainer.global_step, self.seconds)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        shown = self._shown
        if shown is None:
            return
        self._images += images_in(batch, trainer.world_size)
        loss = outputs["loss"].detach().float()
        self._loss = loss if self._loss is None else self._loss.lerp(loss, 0.02)
        stepped, shown.done = trainer.global_step != shown.done, trainer.global_step
        if stepped and shown.due():
            rate = self._images / (time.monotonic() - shown.shown)
            shown.show(f"{rate:.4g} images/s, loss {self._loss:.4f}")
            self._images = 0

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
        self._shown, self._images, self._loss = None, 0, None
