"""Corrects Lightning's progress counts and validation, so that a run resumes exactly on any number of ranks."""

from math import prod
from typing import Any

from lightning.pytorch import Trainer


def batch_split(trainer: Trainer) -> dict[str, int]:
    """Returns how the samples of an optimizer step are split into ranks, accumulated batches and samples per batch."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    batch_size = {} if data is None else {"batch_size": data.batch_size}
    return {"ranks": trainer.world_size, "accumulation": trainer.accumulate_grad_batches, **batch_size}


def samples_per_step(split: dict[str, int]) -> int | None:
    """Returns the number of samples of an optimizer step, or None if a `batch_split` does not contain it."""
    return prod(split.values()) if {"ranks", "accumulation", "batch_size"} <= split.keys() else None


def align_progress(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Corrects Lightning's progress counts in a checkpoint, and converts them to this run's `batch_split`.

    Lightning 2.6 miscounts epochs that a resumed run started. If samples are split differently than before, the batch
    counts are recomputed from the position in the data.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if batches["current"]["completed"] == batches["current"]["processed"] - 1:  # saved at the end of a batch
        for count in (epochs["total"], epochs["current"]):
            count |= dict.fromkeys(("ready", "started"), count["processed"] + 1)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if data is not None and checkpoint.get("dealing", batch_split(trainer)) != batch_split(trainer):
        seen, length = checkpoint[type(data).__qualname__]["seen"], len(data.train_dataloader())
        total = seen // (data.batch_size * trainer.world_size)
        done = (total - 1) % length + 1  # at the end of a batch: an epoch's last batch is done, the epoch is not
        for name, number in (("total", total), ("current", done)):
            batches[name] |= dict.fromkeys(("ready", "started", "processed"), number) | {"completed": number - 1}
        batches["is_last_batch"] = done == length


def validation_due(trainer: Trainer) -> bool:
    """Returns whether Lightning validates after this batch."""
    return bool(_epoch_loop(trainer)._should_check_val_fx(trainer.fit_loop._data_fetcher))


def run_missed_validation(trainer: Trainer) -> None:
    """Runs the validation that was due right after the checkpoint's step, which Lightning skips on resuming."""
    loop = _epoch_loop(trainer)
    if not (loop.restarted_on_train_batch_end and validation_due(trainer)):
        return
    epochs = trainer.fit_loop.epoch_progress.current
    finished = int(loop.batch_progress.is_last_batch)  # the epoch counts as completed now, but did not then
    epochs.completed -= finished
    trainer.validating, loop.val_loop.restarting = True, False
    loop.val_loop.run()
    trainer.training = True
    epochs.completed += finished


def _epoch_loop(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop
