"""Checks that a run trains with the settings of its config, whatever a checkpoint or a callback has changed."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers

REPLACEMENTS = {Timer: "trainer.max_time", GradientAccumulationScheduler: "data.global_batch"}


class EffectiveSettings(Callback):
    """Compares hyperparameters, learning rate and batch size with those of the config when training starts.

    Raises ValueError that names each difference. The expected values come from a new optimizer of the module at the
    current step of its learning-rate curve.
    """

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if setting := REPLACEMENTS.get(type(callback)):
                raise ValueError(f"the callback {type(callback).__name__} is not supported: set {setting} instead")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if differences := [*_optimizer(trainer, module), *_batch(trainer)]:
            raise ValueError(
                f"the run would not train with the settings of its config ({'; '.join(differences)}), because a "
                "checkpoint or a callback changed them: remove that callback, or resume from another checkpoint"
            )


def _optimizer(trainer: Trainer, module: LightningModule) -> Iterator[str]:
    optimizers, schedulers = _init_optimizers_and_lr_schedulers(module)
    for curve, restored in zip(schedulers, trainer.lr_scheduler_configs, strict=True):
        if restored.scheduler.last_epoch != trainer.global_step:
            yield f"the learning rate is that of step {restored.scheduler.last_epoch} instead of {trainer.global_step}"
        curve.scheduler.load_state_dict(restored.scheduler.state_dict())
    for new, used in zip(optimizers, trainer.optimizers, strict=True):
        for expected, group in zip(new.param_groups, used.param_groups, strict=True):
            for name, value in expected.items():
                if name not in ("params", *vars(used).get("learned", ())) and group.get(name) != value:
                    yield f"{_setting(name)} is {group.get(name)} instead of {value}"


def _setting(name: str) -> str:
    return "the learning rate of this step" if name == "lr" else f"optimizer.{name.removeprefix('initial_')}"


def _batch(trainer: Trainer) -> Iterator[str]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    batches, expected = trainer.accumulate_grad_batches, data.accumulation(trainer.world_size)
    if batches != expected:
        yield f"an optimizer step takes {batches} batches instead of {expected}, which data.global_batch asks for"
