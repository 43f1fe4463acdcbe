"""Passes a run's settings to its loggers, so that runs can be identified and sorted by them."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ldm.callbacks.monitoring.metrics import FILE


class Hyperparameters(Callback):
    """Logs the `settings` at the start; to TensorBoard at the end, together with the metrics in the run's folder.

    TensorBoard's HParams tab shows only runs that have metrics. The CSV logger gets no settings, because config.yaml
    is in the same folder. Validation metrics are not logged again at the last step, because TensorBoard already has
    them at their own step.
    """

    def __init__(self, settings: dict[str, Any], folder: str | Path) -> None:
        self.settings, self.folder = settings, Path(folder)

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self.settings)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        file = self.folder / FILE
        if not trainer.is_global_zero or not file.is_file():
            return
        metrics = json.loads(file.read_text())["metrics"]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                from torch.utils.tensorboard.summary import hparams  # slow to import

                measured = {name: value for name, value in metrics.items() if not name.startswith("val/")}
                logger.log_metrics(measured, trainer.global_step - 1)
                for summary in hparams(self.settings, metrics):
                    logger.experiment.file_writer.add_summary(summary)
