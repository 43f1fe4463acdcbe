"""What tells whether a run is well: learning rate, gradient norm, and a loss that is a number."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm

from ldm.callbacks.steps import logs, stepped


class Health(Callback):
    """Logs every `trainer.log_every_n_steps` steps; raises FloatingPointError if a loss was not finite.

    Losses are looked at then and before each save, so that no step waits for the device and no broken
    state is ever saved.
    """

    def __init__(self) -> None:
        self._broken: Tensor | None = None  # the first step with a loss that is no number, else infinity

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The norm is that before clipping, which Lightning does after this."""
        if logs(trainer, trainer.global_step + 1):
            groups = optimizer.param_groups
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            module.log("train/grad_norm", get_total_norm(gradients))
            module.log("train/lr", groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach()
        if self._broken is None:
            self._broken = torch.full((), torch.inf, device=loss.device)
        self._broken = torch.where(loss.isfinite(), self._broken, self._broken.clamp(max=trainer.global_step))
        if logs(trainer, trainer.global_step) and stepped(trainer, batch_idx):
            self._raise_if_broken(trainer)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._raise_if_broken(trainer)

    def _raise_if_broken(self, trainer: Trainer) -> None:
        broken = self._broken is not None and bool(self._broken.isfinite())
        if trainer.strategy.reduce_boolean_decision(broken, all=False):
            where = f"of step {int(self._broken)}" if broken and self._broken is not None else "on another rank"
            raise FloatingPointError(
                f"the loss {where} is not finite: lower optimizer.lr, train with precision=32, or look at "
                "the data; the last checkpoint is from before"
            )
