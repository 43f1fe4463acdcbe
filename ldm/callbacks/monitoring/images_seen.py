"""Logs how much of the data a run has trained on."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.callbacks.steps import is_logged, stepped


class ImagesSeen(Callback):
    """Logs train/images_seen (all ranks, including this step) and "epoch" (images seen / size of the data set).

    Lightning's own epoch is shorter than the training set, because it consists of complete optimizer steps.
    """

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not (is_logged(trainer, trainer.global_step) and stepped(trainer, batch_idx)):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        seen = torch.tensor(data.seen, dtype=torch.float64)  # float32 is exact only up to 16.8 million
        module.log("train/images_seen", seen)
        module.log("epoch", seen / len(data.train))

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        module.log("epoch", data.seen / len(data.train), sync_dist=True)  # the same on all ranks
