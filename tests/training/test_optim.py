from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from ldm.training.muon import Muon
from ldm.training.optim import Curve, MakeOptimizer, constant, cosine, linear, with_curve
from tests.training.tiny import diffusion, fit


def curve_of(curve: Curve, total: int) -> list[float]:
    return [curve(step, total) for step in range(total)]


@pytest.mark.parametrize("curve", [constant(9), cosine(9), linear(9, hold=0.1)])
def test_the_warmup_rises_linearly_from_above_zero_to_one(curve: Curve) -> None:
    assert curve_of(curve, 100)[:10] == pytest.approx([0.1 * step for step in range(1, 11)])


def test_the_warmup_can_start_at_a_given_factor() -> None:
    assert curve_of(cosine(500, 0.01, first=0.01), 1000)[:501:250] == pytest.approx([0.01, 0.505, 1.0])


def test_constant_stays_at_one() -> None:
    assert curve_of(constant(), 5) == [1.0] * 5


@pytest.mark.parametrize("curve", [cosine(10, 0.01), linear(10, 0.01, 0.5), cosine(0, 0.01), linear(0, 0.01)])
@pytest.mark.parametrize("total", [12, 50, 1000])
def test_the_curve_falls_to_the_final_factor_at_the_last_step(curve: Curve, total: int) -> None:
    factors = curve_of(curve, total)
    assert factors[-1] == pytest.approx(0.01)
    assert factors[10:] == sorted(factors[10:], reverse=True) and max(factors) == pytest.approx(1.0)


def test_cosine_equals_cosine_annealing_of_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = CosineAnnealingLR(optimizer, T_max=19, eta_min=0.2)
    for factor in curve_of(cosine(final=0.1), 20):
        assert 2.0 * factor == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_linear_holds_the_factor_before_it_falls() -> None:
    factors = curve_of(linear(hold=0.5, final=0.0), 21)
    assert factors == pytest.approx([1.0] * 11 + [1 - 0.1 * step for step in range(1, 11)])


@pytest.mark.parametrize("curve", [constant(10), cosine(10), linear(10)])
def test_a_run_shorter_than_its_warmup_has_positive_factors(curve: Curve) -> None:
    assert all(0 < factor <= 1 for factor in curve_of(curve, 3))


@pytest.mark.parametrize("lr", [0.0, -1.0])
def test_a_learning_rate_that_is_not_positive_is_refused(lr: float) -> None:
    def make(weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(weights, lr=1.0)
        optimizer.param_groups[0]["lr"] = lr
        return optimizer

    with pytest.raises(ValueError, match=r"optimizer\.lr is .*, but must be positive"):
        with_curve(make, [nn.Parameter(torch.zeros(1))], constant(), Trainer())


class Rates(LightningModule):
    """Records the learning rate of every step."""

    def __init__(self, curve: Curve) -> None:
        super().__init__()
        self.weight, self.curve, self.rates = nn.Parameter(torch.zeros(())), curve, list[float]()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return with_curve(partial(torch.optim.SGD, lr=2.0), [self.weight], self.curve, self.trainer)

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        return self.weight

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("batches", [1, 2])
def test_a_run_follows_the_curve_per_optimizer_step(tmp_path: Path, batches: int) -> None:
    module = Rates(partial(lambda step, total: (step + 1) / total))
    fit(tmp_path, module, steps=5, accumulate_grad_batches=batches)
    assert module.rates == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def trained(folder: Path, module: LightningModule, steps: int, **how: Any) -> Path:
    """Trains, and returns the path of the checkpoint."""
    path = folder / f"{steps}.ckpt"
    fit(folder, module, steps, **how).save_checkpoint(path)
    return path


def weights_of(module: LightningModule) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


class ChangeHyperparameters(Callback):
    """Changes the hyperparameters of an uninterrupted run before the given batch."""

    def __init__(self, batch: int, lr: float, weight_decay: float) -> None:
        self.batch, self.lr, self.weight_decay = batch, lr, weight_decay

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.batch:
            (config,) = trainer.lr_scheduler_configs
            config.scheduler.base_lrs = [self.lr for _ in trainer.optimizers[0].param_groups]
            for group in trainer.optimizers[0].param_groups:
                group |= {"lr": self.lr, "weight_decay": self.weight_decay}


OPTIMIZERS = [partial(torch.optim.AdamW, fused=True), Muon]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_changed_hyperparameters_apply_from_the_first_step_of_a_resumed_run(tmp_path: Path, make: Any) -> None:
    old, new = {"lr": 1e-2, "weight_decay": 0.1}, {"lr": 3e-3, "weight_decay": 0.5}
    changed, resumed = diffusion(optimizer=partial(make, **old)), diffusion(optimizer=partial(make, **new))
    fit(tmp_path, changed, 4, callbacks=[ChangeHyperparameters(2, **new)])
    checkpoint = trained(tmp_path, diffusion(optimizer=partial(make, **old)), 2)
    fit(tmp_path, resumed, 4, checkpoint)
    assert torch.equal(weights_of(resumed), weights_of(changed))


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_without_changes_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, make: Any) -> None:
    settings = {"optimizer": partial(make, lr=1e-2), "lr": cosine(2)}
    straight, resumed = diffusion(**settings), diffusion(**settings)
    fit(tmp_path, straight, 5)
    fit(tmp_path, resumed, 5, trained(tmp_path, diffusion(**settings), 2, callbacks=[Lengthened(5)]))
    assert torch.equal(weights_of(resumed), weights_of(straight))


class Lengthened(Callback):
    """Gives a run the curve of a longer run, as if it were interrupted."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        curve = module.curve
        module.curve = lambda step, _: curve(step, self.steps)  # type: ignore[operator]


def test_the_first_step_of_an_extended_run_uses_the_longer_curve(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, Rates(cosine()), 3)
    longer, straight = Rates(cosine()), Rates(cosine())
    fit(tmp_path, longer, 6, checkpoint)
    fit(tmp_path, straight, 6)
    assert longer.rates == straight.rates[3:]


class Older(Rates):
    """Restores hyperparameters and curve from checkpoints, as older versions did."""

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.SGD([self.weight], lr=2.0)
        schedule = LambdaLR(optimizer, lambda step: self.curve(step, 6))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_checkpoint_with_hyperparameters_and_a_curve_is_resumed_exactly(tmp_path: Path) -> None:
    resumed, straight = Rates(cosine()), Rates(cosine())
    fit(tmp_path, straight, 6)
    fit(tmp_path, resumed, 6, trained(tmp_path, Older(cosine()), 3))
    assert resumed.rates == straight.rates[3:]
    assert torch.equal(resumed.weight, straight.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(torch.optim.AdamW, amsgrad=True), "lacks max_exp_avg_sq, which AdamW keeps for each weight"),
        (partial(torch.optim.RMSprop, momentum=0.9), "lacks momentum_buffer, square_avg, which RMSprop keeps"),
        (Muon, "groups the weights differently than Muon"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(tmp_path: Path, make: MakeOptimizer, message: str) -> None:
    checkpoint = trained(tmp_path, diffusion(optimizer=torch.optim.AdamW), 1)
    with pytest.raises(ValueError, match=f"{message}.*start a new run from its weights with training.start"):
        fit(tmp_path, diffusion(optimizer=make), 2, checkpoint)
