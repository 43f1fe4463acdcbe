"""Averages logged training values over the batches and ranks of an optimizer step."""

import torch
from lightning import LightningModule
from torch import Tensor


class StepMeans:
    """Logs the means of named values over the batches of an optimizer step and over ranks as train/NAME.

    Call `add` for each batch, and `log` in `on_before_optimizer_step`, after the step's last batch. All batches must
    have the same size, so that the mean of their means is the mean over samples.
    """

    def __init__(self) -> None:
        self._batches: list[dict[str, Tensor]] = []

    def add(self, **values: Tensor) -> None:
        self._batches.append({name: value.detach() for name, value in values.items()})

    def log(self, module: LightningModule) -> None:
        batches, self._batches = self._batches, []
        for name in batches[0]:
            module.log(f"train/{name}", torch.stack([batch[name] for batch in batches]).float().mean(), sync_dist=True)
