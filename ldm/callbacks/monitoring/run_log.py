"""Writes what happens in a run to its log."""

import os
import platform
import shlex
import sys
from typing import Any

import torch
from lightning import __version__ as lightning_version
from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.callbacks.monitoring.log_file import LOG, LogFile
from ldm.callbacks.monitoring.outcome import describe_stop
from ldm.errors import EXPECTED


class RunLog(Callback):
    """Opens the `file` of each rank when training starts, and logs start, validations, checkpoints and end."""

    def __init__(self, file: LogFile) -> None:
        self.file = file

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.file.open(trainer.global_rank)
        device = trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        where = (
            f"process {os.getpid()} on {platform.node()}, rank {trainer.global_rank} of {trainer.world_size} on {name}"
        )
        python, versions = platform.python_version(), f"torch {torch.__version__}, lightning {lightning_version}"
        command = shlex.join(["python", *sys.argv])
        LOG.info(f"training from step {trainer.global_step}: {command} ({where}, {versions}, Python {python})")

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        logged = trainer.callback_metrics.items()  # on every rank, because this may reduce them
        values = [f"{name} {float(value):.6g}" for name, value in logged if name.startswith("val/")]
        if trainer.is_global_zero and not trainer.sanity_checking:
            LOG.info(f"validated after step {trainer.global_step}: {', '.join(values)}")

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            LOG.info(f"saving the checkpoint of step {trainer.global_step}")

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if self.file.path.parent.is_dir() and not isinstance(exception, EXPECTED):  # a refused run leaves no file
            self.file.open(trainer.global_rank)
        if cause := describe_stop(exception):
            LOG.info(f"stopped by {cause} after step {trainer.global_step}")
        else:
            LOG.error(f"failed after step {trainer.global_step}", exc_info=exception)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.file.open(trainer.global_rank)
        if trainer.is_global_zero:
            LOG.info(f"finished after step {trainer.global_step}")
