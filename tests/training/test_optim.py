from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ldm.training.optim import Curve, constant, cosine, linear, with_curve
from tests.training.tiny import fit


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
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"optimizer\.lr is .*, but nothing is learned unless it is positive"):
        with_curve(optimizer, constant(), Trainer())


class Rates(LightningModule):
    """Notes the rate of every step."""

    def __init__(self, curve: Curve) -> None:
        super().__init__()
        self.weight, self.curve, self.rates = nn.Parameter(torch.zeros(())), curve, list[float]()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return with_curve(torch.optim.SGD([self.weight], lr=2.0), self.curve, self.trainer)

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        return self.weight

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("batches", [1, 2])
def test_a_run_follows_the_curve_by_optimizer_steps_to_its_last(tmp_path: Path, batches: int) -> None:
    module = Rates(partial(lambda step, total: (step + 1) / total))
    fit(tmp_path, module, steps=5, accumulate_grad_batches=batches)
    assert module.rates == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
