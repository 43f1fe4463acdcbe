"""What a training step reports of the global batch, however it was split into batches and over ranks."""

import torch
from lightning import LightningModule
from torch import Tensor


class StepMeans:
    """Means of named values over the batches of one optimizer step and over ranks, logged as train/NAME.

    `add` takes what each batch gives; `log` is for `on_before_optimizer_step`, after the step's last batch. Batches
    are of one size, so that the mean of their means is that of their samples.
    """

    def __init__(self) -> None:
        self._batches: list[dict[str, Tensor]] = []

    def add(self, **values: Tensor) -> None:
        self._batches.append({name: value.detach() for name, value in values.items()})

    def log(self, module: LightningModule) -> None:
        batches, self._batches = self._batches, []
        for name in batches[0]:
            module.log(f"train/{name}", torch.stack([batch[name] for batch in batches]).float().mean(), sync_dist=True)
