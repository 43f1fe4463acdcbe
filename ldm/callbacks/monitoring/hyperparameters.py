"""A run's settings for its loggers, so that runs can be told apart and sorted by them."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ldm.callbacks.monitoring.metrics import FILE


class Hyperparameters(Callback):
    """Gives every logger the `settings` at the start; TensorBoard at the end, with the metrics of the run's folder.

    TensorBoard's tab shows runs with their metrics only. The CSV log has none: config.yaml lies beside it. Validation
    numbers are in TensorBoard at their own step, and are not logged again at the last one.
    """

    def __init__(self, settings: dict[str, Any], folder: str | Path) -> None:
        self.settings, self.folder = settings, Path(folder)

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger | TensorBoardLogger):
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
