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
def test_the_warm_up_is_a_line_that_starts_above_zero_and_ends_at_one(curve: Curve) -> None:
    assert curve_of(curve, 100)[:10] == pytest.approx([0.1 * step for step in range(1, 11)])


def test_the_warm_up_may_start_elsewhere() -> None:
    assert curve_of(cosine(500, 0.01, first=0.01), 1000)[:501:250] == pytest.approx([0.01, 0.505, 1.0])


def test_constant_stays_at_one() -> None:
    assert curve_of(constant(), 5) == [1.0] * 5


@pytest.mark.parametrize("curve", [cosine(10, 0.01), linear(10, 0.01, 0.5), cosine(0, 0.01), linear(0, 0.01)])
@pytest.mark.parametrize("total", [12, 50, 1000])
def test_the_last_step_has_the_final_rate_and_none_before_it_rises(curve: Curve, total: int) -> None:
    factors = curve_of(curve, total)
    assert factors[-1] == pytest.approx(0.01)
    assert factors[10:] == sorted(factors[10:], reverse=True) and max(factors) == pytest.approx(1.0)


def test_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = CosineAnnealingLR(optimizer, T_max=19, eta_min=0.2)
    for factor in curve_of(cosine(final=0.1), 20):
        assert 2.0 * factor == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_linear_holds_its_rate_before_it_falls() -> None:
    factors = curve_of(linear(hold=0.5, final=0.0), 21)
    assert factors == pytest.approx([1.0] * 11 + [1 - 0.1 * step for step in range(1, 11)])


@pytest.mark.parametrize("curve", [constant(10), cosine(10), linear(10)])
def test_a_run_shorter_than_its_warm_up_still_has_a_rate(curve: Curve) -> None:
    assert all(0 < factor <= 1 for factor in curve_of(curve, 3))


@pytest.mark.parametrize("lr", [0.0, -1.0])
def test_a_rate_with_which_nothing_is_learned_is_refused(lr: float) -> None:
    def make(weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(weights, lr=1.0)
        optimizer.param_groups[0]["lr"] = lr
        return optimizer

    with pytest.raises(ValueError, match=r"optimizer\.lr is .*, but nothing is learned unless it is positive"):
        with_curve(make, [nn.Parameter(torch.zeros(1))], constant(), Trainer())


class Rates(LightningModule):
    """Notes the rate of every step."""

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
def test_a_run_follows_the_curve_by_optimizer_steps_to_its_last(tmp_path: Path, batches: int) -> None:
    module = Rates(partial(lambda step, total: (step + 1) / total))
    fit(tmp_path, module, steps=5, accumulate_grad_batches=batches)
    assert module.rates == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def trained(folder: Path, module: LightningModule, steps: int, **how: Any) -> Path:
    """The checkpoint of a run."""
    path = folder / f"{steps}.ckpt"
    fit(folder, module, steps, **how).save_checkpoint(path)
    return path


def weights_of(module: LightningModule) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


class Turn(Callback):
    """Sets the hyperparameters of a run that is never stopped, before the given batch."""

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
def test_other_hyperparameters_take_effect_at_the_first_step_of_a_resumed_run(tmp_path: Path, make: Any) -> None:
    old, new = {"lr": 1e-2, "weight_decay": 0.1}, {"lr": 3e-3, "weight_decay": 0.5}
    turned, resumed = diffusion(optimizer=partial(make, **old)), diffusion(optimizer=partial(make, **new))
    fit(tmp_path, turned, 4, callbacks=[Turn(2, **new)])
    checkpoint = trained(tmp_path, diffusion(optimizer=partial(make, **old)), 2)
    fit(tmp_path, resumed, 4, checkpoint)
    assert torch.equal(weights_of(resumed), weights_of(turned))


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_without_changes_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path, make: Any) -> None:
    settings = {"optimizer": partial(make, lr=1e-2), "lr": cosine(2)}
    straight, resumed = diffusion(**settings), diffusion(**settings)
    fit(tmp_path, straight, 5)
    fit(tmp_path, resumed, 5, trained(tmp_path, diffusion(**settings), 2, callbacks=[Lengthened(5)]))
    assert torch.equal(weights_of(resumed), weights_of(straight))


class Lengthened(Callback):
    """Makes a run's curve that of a longer one, as if it were going to be stopped."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        curve = module.curve
        module.curve = lambda step, _: curve(step, self.steps)  # type: ignore[operator]


def test_the_first_step_of_a_lengthened_run_has_the_rate_of_the_longer_curve(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, Rates(cosine()), 3)
    longer, straight = Rates(cosine()), Rates(cosine())
    fit(tmp_path, longer, 6, checkpoint)
    fit(tmp_path, straight, 6)
    assert longer.rates == straight.rates[3:]


class Older(Rates):
    """Restores all of its optimizer and of its curve, as runs once did."""

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.SGD([self.weight], lr=2.0)
        schedule = LambdaLR(optimizer, lambda step: self.curve(step, 6))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_checkpoint_that_also_holds_hyperparameters_and_a_curve_is_resumed_exactly(tmp_path: Path) -> None:
    resumed, straight = Rates(cosine()), Rates(cosine())
    fit(tmp_path, straight, 6)
    fit(tmp_path, resumed, 6, trained(tmp_path, Older(cosine()), 3))
    assert resumed.rates == straight.rates[3:]
    assert torch.equal(resumed.weight, straight.weight)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (partial(torch.optim.AdamW, amsgrad=True), "lacks max_exp_avg_sq, which AdamW keeps for each weight"),
        (partial(torch.optim.RMSprop, momentum=0.9), "lacks momentum_buffer, square_avg, which RMSprop keeps"),
        (Muon, "groups the weights in another way than Muon does"),
    ],
)
def test_state_that_another_optimizer_left_is_refused(tmp_path: Path, make: MakeOptimizer, told: str) -> None:
    checkpoint = trained(tmp_path, diffusion(optimizer=torch.optim.AdamW), 1)
    with pytest.raises(ValueError, match=f"{told}.*start a new run from its weights with training.start"):
        fit(tmp_path, diffusion(optimizer=make), 2, checkpoint)
