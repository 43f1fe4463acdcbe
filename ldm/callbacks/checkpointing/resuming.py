"""What Lightning leaves to be done for a run to go on exactly, with any number of ranks."""

from typing import Any

from lightning.pytorch import Trainer


def batch_split(trainer: Trainer) -> dict[str, int]:
    """How the samples of an optimizer step are dealt out: to ranks, batches in a row, and samples a batch."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    batch_size = {} if data is None else {"batch_size": data.batch_size}
    return {"ranks": trainer.world_size, "accumulation": trainer.accumulate_grad_batches, **batch_size}


def align_progress(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Makes Lightning's counts in a checkpoint what they were when it was saved, or what other ranks would have made.

    Lightning 2.6 miscounts epochs that were begun by a resumed run. Where batches are dealt out otherwise than
    before, its count of them moves to where the data stands.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if batches["current"]["completed"] == batches["current"]["processed"] - 1:  # at the end of a batch, within an epoch
        for count in (epochs["total"], epochs["current"]):
            count |= dict.fromkeys(("ready", "started"), count["processed"] + 1)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if data is not None and checkpoint.get("dealing", batch_split(trainer)) != batch_split(trainer):
        seen, length = checkpoint[type(data).__qualname__]["seen"], len(data.train_dataloader())
        total = seen // (data.batch_size * trainer.world_size)
        done = (total - 1) % length + 1  # as at the end of a batch: the last one of a pass is done, not the pass
        for name, number in (("total", total), ("current", done)):
            batches[name] |= dict.fromkeys(("ready", "started", "processed"), number) | {"completed": number - 1}
        batches["is_last_batch"] = done == length


def validation_due(trainer: Trainer) -> bool:
    """Whether Lightning validates after this batch."""
    return bool(_epoch_loop(trainer)._should_check_val_fx(trainer.fit_loop._data_fetcher))


def run_missed_validation(trainer: Trainer) -> None:
    """Makes up for the validation that came after the step of the checkpoint, which Lightning passes over."""
    loop = _epoch_loop(trainer)
    if not (loop.restarted_on_train_batch_end and validation_due(trainer)):
        return
    epochs = trainer.fit_loop.epoch_progress.current
    past = int(loop.batch_progress.is_last_batch)  # the epoch counts as completed by now, as it did not then
    epochs.completed -= past
    trainer.validating, loop.val_loop.restarting = True, False
    loop.val_loop.run()
    trainer.training = True
    epochs.completed += past


def _epoch_loop(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop
