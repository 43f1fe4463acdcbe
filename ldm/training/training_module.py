"""Defines what all training modules share about an optimizer step."""

from typing import Any

import torch
from lightning import LightningModule

from ldm.training.step_means import StepMeans


class TrainingModule(LightningModule):
    """Logs the means that `training_step` adds to `means`, and keeps gradients only as long as a step needs them."""

    def __init__(self) -> None:
        super().__init__()
        self.means = StepMeans()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.means.log(self)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Also frees the gradients, so that the activations of the next forward pass can use their memory.

        With DDP's `gradient_as_bucket_view` their memory remains allocated.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()
