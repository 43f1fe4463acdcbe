"""An exponential moving average of the UNet's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn


class EMA(Callback):
    """average ← average + (1 - decay)·(weight - average) after each optimizer step, in float32.

    With `warmup` the decay is min(decay, (1 + n) / (10 + n)) at the n-th update, so that the first weights
    are soon forgotten. Averages are used in validation and tests, and lie in checkpoints as
    "ema": {parameter of the UNet: tensor}; a checkpoint without them starts the average at its weights.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay is {decay}, but must lie in [0, 1); ema=none does without an average")
        self.decay, self.warmup = decay, warmup
        self.updates = 0
        self.averages: dict[str, Tensor] = {}
        self._step = 0  # the optimizer step of the last update
        self._weights: list[Tensor] = []  # the training weights, while the averages are in their place

    @torch.no_grad()
    def update(self, unet: nn.Module) -> None:
        """Takes in the UNet's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        weights = [weight.float() for weight in unet.parameters()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)

    @contextmanager
    def swapped(self, module: LightningModule) -> Iterator[None]:
        """Within it the module's UNet holds the averages, afterwards its own weights again, come what may."""
        try:
            self._swap_in(module)
            yield
        finally:
            self._swap_out(module)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Puts the averages on the weights' device: here they have reached it under every strategy."""
        self._step = trainer.global_step
        self.averages = {
            name: self.averages.get(name, weight).detach().to(weight.device, torch.float32, copy=True)
            for name, weight in unet_of(module).named_parameters()
        }

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step != self._step:  # the others only accumulate gradients
            self._step = trainer.global_step
            self.update(unet_of(module))

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_in(module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_out(module)

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_in(module)

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_out(module)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._swap_out(module)

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._weights:
            raise RuntimeError("no checkpoint can be saved while the averages stand in for the training weights")
        checkpoint["ema"] = dict(self.averages)

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.averages = dict(checkpoint.get("ema", {}))

    @torch.no_grad()
    def _swap_in(self, module: LightningModule) -> None:
        if self._weights:
            raise RuntimeError("the averages are in place of the weights already")
        if not self.averages:  # training has not begun
            return
        for name, parameter in unet_of(module).named_parameters():
            self._weights.append(parameter.detach().clone())
            parameter.copy_(self.averages[name])

    @torch.no_grad()
    def _swap_out(self, module: LightningModule) -> None:
        for parameter, weight in zip(unet_of(module).parameters(), self._weights, strict=False):
            parameter.copy_(weight)
        self._weights = []


def unet_of(module: LightningModule) -> nn.Module:
    """The network that is trained and averaged."""
    unet = module.unet
    assert isinstance(unet, nn.Module)
    return unet
