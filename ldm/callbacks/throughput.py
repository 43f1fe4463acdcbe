"""How fast a run trains, and how much of that time it waits for data."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.callbacks.steps import logs, stepped


class Throughput(Callback):
    """Logs images a second (of all ranks) and the share of time spent waiting for data.

    `images` and `seconds` are of this process's training so far, without what comes after a `pause`.
    """

    def __init__(self) -> None:
        self.images, self.seconds, self.waited = 0, 0.0, 0.0
        self._logged = (0, 0.0, 0.0)  # the same at the last logging
        self._since: float | None = None  # when the time last looked at the clock

    def pause(self) -> None:
        """The time from the last batch to the next one is not training's."""
        self._since = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.waited += self._lap()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._lap()
        self.images += images_in(batch, trainer.world_size)
        if logs(trainer, trainer.global_step) and stepped(trainer, batch_idx):
            images, seconds, waited = self._logged
            passed = self.seconds - seconds
            module.log("train/images_per_second", (self.images - images) / passed)
            module.log("train/data_wait", (self.waited - waited) / passed)
            self._logged = (self.images, self.seconds, self.waited)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.pause()

    def _lap(self) -> float:
        now = time.perf_counter()
        lap = 0.0 if self._since is None else now - self._since
        self.seconds, self._since = self.seconds + lap, now
        return lap


def images_in(batch: dict[str, Any], ranks: int) -> int:
    """How many images all ranks together hold, if each has such a batch."""
    return len(batch["id"]) * ranks
