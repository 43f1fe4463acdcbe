"""Logs validation values."""

from lightning import LightningModule
from torch import Tensor


def log_validation(module: LightningModule, dataloader_idx: int, values: dict[str, Tensor]) -> None:
    """Logs the means of per-sample values (b,) as val/SET/NAME, averaged over the set and over ranks."""
    name = list(module.trainer.datamodule.val)[dataloader_idx]  # type: ignore[attr-defined]
    for key, value in values.items():
        module.log(
            f"val/{name}/{key}",
            value.float().mean(),
            batch_size=len(value),
            sync_dist=True,
            add_dataloader_idx=False,
        )
