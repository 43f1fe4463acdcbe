"""Where a run stands at the end of a batch."""

from lightning.pytorch import Trainer


def stepped(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimizer took a step with this batch, instead of only accumulating its gradients."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def logs(trainer: Trainer, step: int) -> bool:
    """Whether Lightning hands what is logged at this step, counted from 1, to the loggers."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0


def ending(trainer: Trainer) -> bool:
    """Whether this was the run's last batch."""
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    done = trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)
    return bool(trainer.should_stop or done)
