"""Ends a run if a part that should be trained does not change."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ldm.adapters.low_rank import LowRank
from ldm.callbacks.steps import stepped

SHOWN = 3


class Learning(Callback):
    """Checks after `after` steps that low-rank changes are not zero, and that gradients reach a trained text encoder.

    Raises ValueError with the names of the layers whose `up` is still zero, or if no trained weight of the text encoder
    has had a gradient; also at the end of a shorter run if all changes are zero.
    """

    def __init__(self, after: int = 100) -> None:
        if after < 1:
            raise ValueError(f"callbacks.learning.after is {after}, but must be 1 step or more")
        self.after = after
        self.reached = False  # whether a weight of the text encoder has had a gradient

    def state_dict(self) -> dict[str, bool]:
        return {"reached": self.reached}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        self.reached = state["reached"]

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        text: dict[str, nn.Parameter] = module.trainable_text()  # type: ignore[operator]
        if not text or self.reached or trainer.global_step >= self.after:
            return
        self.reached = _any_gradient(text.values())  # not in every step: captions are dropped at random
        if trainer.global_step + 1 == self.after and not self.reached:
            raise ValueError(
                f"after {self.after} steps no gradient reaches the {len(text)} weights of the text encoder that are "
                f"trained, such as {next(iter(text))}, so that it learns nothing: train a network that reads text, or "
                "remove training.text_encoder_lr"
            )

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.after and stepped(trainer, batch_idx) and (zero := list(_still_zero(module))):
            names = ", ".join(zero[:SHOWN]) + (f" and {len(zero) - SHOWN} more" if len(zero) > SHOWN else "")
            raise ValueError(
                f"after {self.after} steps the low-rank changes of {len(zero)} layers are still zero ({names}), so "
                "that they learn nothing: leave these layers out of adapter.targets, raise optimizer.lr, or, if the "
                "warm-up is not over by then, raise callbacks.learning.after"
            )

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        steps, layers = trainer.global_step, sum(isinstance(layer, LowRank) for layer in module.modules())
        if layers and 0 < steps < self.after and len(list(_still_zero(module))) == layers:
            raise ValueError(
                f"the run ends after {steps} steps with all low-rank changes still zero, so that nothing was learnt: "
                "raise optimizer.lr, or train for more steps than the warm-up has"
            )


def _any_gradient(weights: Any) -> bool:
    return any(weight.grad is not None and bool(weight.grad.any()) for weight in weights)


def _still_zero(module: nn.Module) -> Iterator[str]:
    for name, layer in module.named_modules():
        if isinstance(layer, LowRank):
            up: Tensor = layer.up
            if not up.any():
                yield name
