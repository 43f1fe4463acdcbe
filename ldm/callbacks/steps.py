"""Relates batches to optimizer steps and to what Lightning logs of them."""

from collections.abc import Mapping

from lightning.pytorch import Trainer


def stepped(trainer: Trainer, batch_idx: int) -> bool:
    """Returns whether the optimizer took a step with this batch, rather than only accumulating its gradients."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def is_logged(trainer: Trainer, step: int) -> bool:
    """Returns whether Lightning passes the values of this step, counted from 1, to the loggers."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0


def log_last_step(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Passes values of the step just taken to the loggers, which count steps from 0, as Lightning does.

    `module.log` would repeat an old value at a step that has none.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), trainer.global_step - 1)


def is_final_batch(trainer: Trainer) -> bool:
    """Returns whether this was the run's last batch."""
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    done = trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)
    return bool(trainer.should_stop or done)
