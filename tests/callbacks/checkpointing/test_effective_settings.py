from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.callbacks.checkpointing.effective_settings import EffectiveSettings
from ldm.training.optim import cosine, with_curve
from tests.training.tiny import fit


class Plain(LightningModule):
    """Lets a checkpoint restore hyperparameters and learning-rate curve, which is Lightning's default."""

    def __init__(self, lr: float = 0.1, **settings: Any) -> None:
        super().__init__()
        self.weight, self.make = nn.Parameter(torch.zeros(3)), partial(torch.optim.AdamW, lr=lr, **settings)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.make([self.weight])
        schedule = LambdaLR(optimizer, lambda step: 1 / (step + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, _: int) -> Tensor:
        return (self.weight - 1).square().sum()


class Curved(Plain):
    """Lets a checkpoint restore only the optimizer state."""

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return with_curve(self.make, [self.weight], cosine(), self.trainer)


def resume(folder: Path, before: LightningModule, after: LightningModule, *callbacks: Callback, **how: Any) -> Trainer:
    fit(folder, before, 2).save_checkpoint(folder / "2.ckpt")
    return fit(folder, after, 4, folder / "2.ckpt", callbacks=[*callbacks, EffectiveSettings()], **how)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.2}, r"optimizer\.lr is 0\.1 instead of 0\.2"),
        ({"weight_decay": 0.5}, r"optimizer\.weight_decay is 0\.01 instead of 0\.5"),
        ({"betas": (0.8, 0.9)}, r"optimizer\.betas is \(0\.9, 0\.999\) instead of \(0\.8, 0\.9\)"),
        ({"amsgrad": True}, r"optimizer\.amsgrad is False instead of True"),
    ],
)
def test_a_hyperparameter_restored_from_a_checkpoint_is_reported(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"would not train with the settings of its config .*{message}"):
        resume(tmp_path, Plain(), Plain(**changed))


def test_a_learning_rate_curve_behind_the_run_is_reported(tmp_path: Path) -> None:
    class Late(Curved):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["lr_schedulers"][0]["last_epoch"] = 1

    with pytest.raises(ValueError, match="the learning rate is that of step 1 instead of 2"):
        resume(tmp_path, Curved(), Late())


class Accumulating(Callback):
    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.accumulate_grad_batches = 2


def test_a_changed_gradient_accumulation_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step takes 2 batches instead of 1, which data\.global_batch asks for"):
        resume(tmp_path, Curved(), Curved(), Accumulating())


@pytest.mark.parametrize(
    ("callback", "setting"),
    [(Timer("00:00:10:00"), "trainer.max_time"), (GradientAccumulationScheduler({0: 2}), "data.global_batch")],
)
def test_a_callback_that_would_override_a_setting_is_refused(tmp_path: Path, callback: Callback, setting: str) -> None:
    with pytest.raises(ValueError, match=f"{type(callback).__name__} is not supported: set {setting}"):
        fit(tmp_path, Curved(), callbacks=[callback, EffectiveSettings()])


@pytest.mark.parametrize("changed", [{}, {"lr": 0.2, "weight_decay": 0.5, "betas": (0.8, 0.9)}])
def test_a_run_with_the_settings_of_its_config_is_accepted(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert resume(tmp_path, Curved(), Curved(**changed)).global_step == 4
