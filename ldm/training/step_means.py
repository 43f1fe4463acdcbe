"""Averages training values over the batches of an optimizer step, and over ranks if they are logged."""

import torch
from lightning import LightningModule
from torch import Tensor


class StepMeans:
    """Logs the means of named values over the batches of an optimizer step as train/NAME.

    The mean of a step that the loggers get is over all ranks, which wait for each other; that of other steps is over
    one. Call `add` for each batch, and `log` in `on_before_optimizer_step`, after the step's last batch. All batches
    must have the same size, so that the mean of their means is the mean over samples.
    """

    def __init__(self) -> None:
        self._batches: list[dict[str, Tensor]] = []

    def add(self, **values: Tensor) -> None:
        self._batches.append({name: value.detach() for name, value in values.items()})

    def log(self, module: LightningModule) -> None:
        batches, self._batches = self._batches, []
        every: int = module.trainer.log_every_n_steps  # type: ignore[attr-defined]
        for name in batches[0]:
            mean = torch.stack([batch[name] for batch in batches]).float().mean()
            if every and (module.trainer.global_step + 1) % every == 0:
                mean = module.trainer.strategy.reduce(mean, reduce_op="mean")
            module.log(f"train/{name}", mean)
