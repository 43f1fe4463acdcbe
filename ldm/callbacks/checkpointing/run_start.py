"""Runs a function once when training starts, after every check of the run has passed."""

from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer


class RunStart(Callback):
    """Calls `start` on rank 0 when training starts, or before the final work of a run that has no step left.

    All checks of a checkpoint come earlier, so that a refused run leaves its folder unchanged. `step` is the optimizer
    step at which training starts.
    """

    def __init__(self, start: Callable[[Trainer], object]) -> None:
        self.start = start
        self.step: int | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start(trainer)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        if self.step is None:
            self.step = trainer.global_step
            if trainer.is_global_zero:
                self.start(trainer)
