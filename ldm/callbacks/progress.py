"""How far a run is, how fast, and how long it still takes."""

import sys
import time
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

from ldm.callbacks.throughput import images_in


class Display:
    """Progress with time left: a bar in a terminal; elsewhere a line every `seconds`, and one at the end."""

    def __init__(
        self, label: str, total: int, done: int = 0, seconds: float = 10.0, stream: TextIO | None = None
    ) -> None:
        self.label, self.total, self.start, self.done = label, total, done, done
        self.stream = stream or sys.stderr
        self.began = self.shown = time.monotonic()
        self.bar: tqdm[Any] | None = None
        self.seconds = seconds
        if self.stream.isatty():
            self.seconds = 0.2
            self.bar = tqdm(
                desc=label, total=total, initial=done, file=self.stream, dynamic_ncols=True, mininterval=0,
                bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {postfix}{remaining} left",
            )  # fmt: skip

    def due(self, done: int) -> bool:
        """Whether it is time to `show` again; asking before saves making a note that nobody sees."""
        return done >= self.total or time.monotonic() - self.shown >= self.seconds

    def show(self, done: int, note: str = "") -> None:
        """`done` of the total; the note, such as a speed, comes before the time left."""
        self.done, self.shown = done, time.monotonic()
        note = f"{note}, " if note else ""
        if self.bar is not None:
            self.bar.n = done
            self.bar.set_postfix_str(note)
        else:
            left = (self.total - done) * (self.shown - self.began) / max(1, done - self.start)
            print(f"{self.label} {done}/{self.total}, {note}{clock(left)} left", file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Progress(ProgressBar):
    """Optimizer steps, images a second of all ranks, the loss (smoothed over 50 batches) and time left."""

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._display: Display | None = None
        self._images = 0  # since the display was last shown
        self._loss: Tensor | None = None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._enabled:
            total = int(trainer.estimated_stepping_batches)
            self._display = Display("training: step", total, trainer.global_step, self.seconds)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        display = self._display
        if display is None:
            return
        self._images += images_in(batch, trainer.world_size)
        loss = outputs["loss"].detach().float()
        self._loss = loss if self._loss is None else self._loss.lerp(loss, 0.02)
        if trainer.global_step != display.done and display.due(trainer.global_step):
            rate = self._images / (time.monotonic() - display.shown)
            display.show(trainer.global_step, f"{rate:.4g} images/s, loss {self._loss:.4f}")
            self._images = 0

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()

    def print(self, *values: Any, sep: str = " ", **_: Any) -> None:
        """What Trainer.print calls, so as not to break the bar."""
        tqdm.write(sep.join(map(str, values)))

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
        self._display, self._images, self._loss = None, 0, None


def clock(seconds: float) -> str:
    """0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
