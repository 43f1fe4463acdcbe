"""Logs the loss by noise level, in training and in validation."""

from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ldm.callbacks.steps import is_logged, log_last_step, stepped

EDGES = range(-8, 9, 2)  # in log-SNR, the same for every schedule so that curves can be compared
RANGES = ("below_-8", *(f"{low}_to_{high}" for low, high in pairwise(EDGES)), "above_8")


class LossByNoise(Callback):
    """Logs the mean loss of the samples in each range of log-SNR, such as train/loss_by_log_snr/-2_to_0.

    Reads "log_snr" and "losses" (b,) from the outputs of `training_step` and `validation_step`, if present. A range
    includes its lower edge; "below_-8" includes pure noise (-inf) and "above_8" the clean image (inf). In training the
    mean is over the samples of all ranks since the last logged step, in validation (val/SET/loss_by_log_snr/RANGE)
    over the set. A range without samples has no value; non-finite losses are ignored.
    """

    def __init__(self) -> None:
        self._training = torch.zeros(2, len(RANGES), dtype=torch.float64)  # see `_sums`
        self._validation: dict[str, Tensor] = {}  # by validation set

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "loss_by_noise" in checkpoint and trainer.is_global_zero:  # rank 0 restores the sums of all ranks
            self._training = checkpoint["loss_by_noise"]

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["loss_by_noise"] = _of_all_ranks(trainer, self._training).cpu()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if "log_snr" not in outputs:
            return
        self._training = self._training.to(outputs["losses"].device) + _sums(outputs)
        if is_logged(trainer, trainer.global_step) and stepped(trainer, batch_idx):
            log_last_step(trainer, _means(trainer, self._training, "train"))
            self._training = torch.zeros_like(self._training)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or outputs is None or "log_snr" not in outputs:
            return
        name = list(trainer.datamodule.val)[dataloader_idx]  # type: ignore[attr-defined]
        sums = _sums(outputs)
        self._validation[name] = self._validation.get(name, torch.zeros_like(sums)) + sums

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        for name, total in self._validation.items():
            log_last_step(trainer, _means(trainer, total, f"val/{name}"))
        self._validation = {}


def _sums(outputs: dict[str, Tensor]) -> Tensor:
    """Returns the sum and the number of losses in each range, (2, ranges)."""
    log_snr, losses = outputs["log_snr"], outputs["losses"]
    # Computed on the device, because a copy to it would wait for it.
    edges = torch.arange(EDGES.start, EDGES.stop, EDGES.step, dtype=log_snr.dtype, device=log_snr.device)
    index = torch.bucketize(log_snr, edges, right=True)
    in_range = (index == torch.arange(len(RANGES), device=index.device)[:, None]) & losses.isfinite()  # (ranges, b)
    return torch.stack((losses.double().where(in_range, 0.0).sum(1), in_range.sum(1).double()))


def _of_all_ranks(trainer: Trainer, sums: Tensor) -> Tensor:
    # The sums of a module without "log_snr" are still on the CPU, from which NCCL cannot reduce.
    total = trainer.strategy.reduce(sums.to(trainer.strategy.root_device, copy=True), reduce_op="sum")
    assert isinstance(total, Tensor)
    return total


def _means(trainer: Trainer, sums: Tensor, prefix: str) -> dict[str, float]:
    losses, counts = _of_all_ranks(trainer, sums).tolist()
    rows = zip(RANGES, losses, counts, strict=True)
    return {f"{prefix}/loss_by_log_snr/{name}": loss / count for name, loss, count in rows if count}
