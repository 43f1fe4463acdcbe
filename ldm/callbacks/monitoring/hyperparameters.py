"""Passes a run's settings to its loggers, so that runs can be identified and sorted by them."""

import json
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ldm.callbacks.monitoring.metrics import FILE


class Hyperparameters(Callback):
    """Logs the `settings` at the start, and, to TensorBoard at the end, the metrics in the run's folder.

    In TensorBoard's HParams tab every run that has started has a row, with all scalars as its metrics: the tab derives
    them from the scalars of all runs unless a run declares which to show. Validation metrics are not logged again at
    the last step, because TensorBoard already has them at their own step. The table of scalars gets no settings,
    because config.yaml is in the same folder.
    """

    def __init__(self, settings: dict[str, Any], folder: str | Path) -> None:
        self.settings, self.folder = settings, Path(folder)

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self.settings)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._summarise(trainer, "start")

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        file = self.folder / FILE
        if trainer.is_global_zero and file.is_file():
            metrics = json.loads(file.read_text())["metrics"]
            measured = {name: value for name, value in metrics.items() if not name.startswith("val/")}
            for logger in _tensorboard(trainer):
                logger.log_metrics(measured, trainer.global_step - 1)
        self._summarise(trainer, "end")

    def _summarise(self, trainer: Trainer, moment: Literal["start", "end"]) -> None:
        """Writes what the HParams tab reads when a run starts, its settings, or when it ends."""
        if not trainer.is_global_zero:
            return
        for logger in _tensorboard(trainer):
            from torch.utils.tensorboard.summary import hparams  # slow to import

            _, start, end = hparams(self.settings, {})
            logger.experiment.file_writer.add_summary(start if moment == "start" else end)


def _tensorboard(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
