"""What is done once, when a run is known to be what its config says."""

from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer


class RunStart(Callback):
    """Calls `start` on the first rank as training starts, or before the work of the end where no step is left.

    Whatever refuses a checkpoint has done so by then, so that the folder of a refused run stays as it was. `step` is
    the optimizer step from which the run trains.
    """

    def __init__(self, start: Callable[[], object]) -> None:
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
                self.start()
