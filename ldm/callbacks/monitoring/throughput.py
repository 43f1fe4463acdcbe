"""Measures training speed and the time spent waiting for data."""

import time
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.callbacks.steps import is_logged, stepped


class Throughput(Callback):
    """Logs images per second of all ranks, and the largest share of time that any rank waits for data.

    Warns if a rank's share exceeds `alarm` over `window` seconds. `images`, `seconds` and `waited` (seconds) count all
    training of the run so far, including earlier processes of a resumed run, but not the time after a `pause`.
    """

    def __init__(self, alarm: float = 0.05, window: float = 60.0) -> None:
        self.alarm, self.window = alarm, window
        self.images, self.seconds, self.waited = 0, 0.0, 0.0
        self.rate = 0.0  # images per second at the last logged step
        self._logged = (0, 0.0, 0.0)  # the same values at the last logged step
        self._since: float | None = None  # when the clock was last read
        self._judged = (0.0, 0.0)  # `seconds` and `waited` at the last comparison with the alarm
        self._alarmed = False

    def state_dict(self) -> dict[str, float]:
        return {"images": self.images, "seconds": self.seconds, "waited": self.waited}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.images, self.seconds, self.waited = int(state["images"]), state["seconds"], state["waited"]
        self._logged = self.images, self.seconds, self.waited
        self._judged = self.seconds, self.waited

    def pause(self) -> None:
        """Excludes the time until the next batch from the training time."""
        self._since = None

    def work(self) -> None:
        """Counts the time since the end of the batch as training, not as waiting for data."""
        self._lap()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.waited += self._lap()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._lap()
        self.images += images_in(batch, trainer.world_size)
        if is_logged(trainer, trainer.global_step) and stepped(trainer, batch_idx):
            images, seconds, waited = self._logged
            passed = self.seconds - seconds
            self.rate = (self.images - images) / passed
            module.log("train/images_per_second", self.rate)
            module.log("train/data_wait", (self.waited - waited) / passed, sync_dist=True, reduce_fx="max")
            self._logged = (self.images, self.seconds, self.waited)
            self._warn(trainer, cached="moments" in batch)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.pause()

    def _warn(self, trainer: Trainer, cached: bool) -> None:
        """Warns each time that the share rises above the alarm; `cached` data is that of latents."""
        seconds, waited = self.seconds - self._judged[0], self.waited - self._judged[1]
        if seconds < self.window:
            return
        self._judged = (self.seconds, self.waited)
        if waited > self.alarm * seconds and not self._alarmed:
            warnings.warn(
                f"rank {trainer.global_rank} spends {waited / seconds:.0%} of its time waiting for data (step "
                f"{trainer.global_step}): raise data.workers"
                + ("" if cached else ", or train from cached latents (ldm encode)"),
                stacklevel=2,
            )
        self._alarmed = waited > self.alarm * seconds

    def _lap(self) -> float:
        now = time.perf_counter()
        lap = 0.0 if self._since is None else now - self._since
        self.seconds, self._since = self.seconds + lap, now
        return lap


def images_in(batch: dict[str, Any], ranks: int) -> int:
    """Returns the number of images on all ranks if each has such a batch."""
    return len(batch["id"]) * ranks
