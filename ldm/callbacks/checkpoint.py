"""Checkpoints that are whole at every moment, and one of them always recent."""

import errno
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks

from ldm.callbacks.steps import ending
from ldm.files import atomic_write


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the old file and renames; reads nothing but tensors and plain data.

    Where the disk is full the old file stays, a warning is given and training goes on.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            atomic_write(path, lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:
            if not _disk_is_full(error):
                raise
            kept = "the older checkpoint there is kept" if Path(path).exists() else "THERE IS NO OLDER ONE"
            warnings.warn(
                f"THE CHECKPOINT OF STEP {checkpoint['global_step']} WAS NOT SAVED, because the disk of "
                f"{path} is full: {kept} and training goes on; free some space before the next save",
                stacklevel=2,
            )

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no checkpoint {path}; give a .ckpt file, or resume=auto")
        try:
            return dict(torch.load(path, map_location=map_location, weights_only=True))
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} is no checkpoint, is cut short, or holds more than plain data ({error})"
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoint(lightning_callbacks.Checkpoint):
    """Keeps `folder`/last.ckpt: every n optimizer steps and at the end.

    It saves at the end of a batch, not of an epoch or of the run, because there resuming is exact. Lightning
    runs it after all other callbacks, so that the EMA has taken in the step.
    """

    def __init__(self, folder: str | Path, every_n_train_steps: int = 1000) -> None:
        if every_n_train_steps < 1:
            raise ValueError(
                f"callbacks.checkpoint.every_n_train_steps is {every_n_train_steps}, but must be 1 or more"
            )
        self.path = Path(folder) / "last.ckpt"
        self.every_n_train_steps = every_n_train_steps
        self._saved = 0  # the step of the file

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if ending(trainer) or trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """For runs that end elsewhere than after a batch, such as by early stopping."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._saved = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind the error: torch.save hides it behind its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
