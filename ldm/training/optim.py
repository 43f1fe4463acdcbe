"""Learning-rate curves, as factors of the optimizer's rate."""

import math
from collections.abc import Callable, Iterable

from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Curve = Callable[[int, int], float]  # (step, of how many) → factor
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


def constant(warmup: int = 0) -> Curve:
    """Linear from 0 over `warmup` steps, then 1."""
    return lambda step, total: min(1.0, (step + 1) / (warmup + 1))


def cosine(warmup: int = 0, final: float = 0.0) -> Curve:
    """`constant`, times half a cosine from 1 at the start down to `final` at the last step."""

    def factor(step: int, total: int) -> float:
        done = _share(step, warmup, total - 1)
        return min(1.0, (step + 1) / (warmup + 1)) * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)

    return factor


def linear(warmup: int = 0, final: float = 0.0, hold: float = 0.0) -> Curve:
    """`constant` for the share `hold` of the steps, then a line down to `final` at the last step."""

    def factor(step: int, total: int) -> float:
        start = warmup + hold * max(0, total - 1 - warmup)
        done = _share(step, start, total - 1)
        return min(1.0, (step + 1) / (warmup + 1)) * (1 + (final - 1) * done)

    return factor


def _share(step: int, start: float, last: int) -> float:
    """How much of the way from start to last is done: 0 until the one, 1 from the other on."""
    return min(1.0, max(0.0, step - start) / (last - start)) if last > start else 0.0


def with_curve(optimizer: Optimizer, curve: Curve, trainer: Trainer) -> OptimizerLRSchedulerConfig:
    """What `configure_optimizers` returns: the optimizer, its rate following the curve step by step."""
    total = int(trainer.estimated_stepping_batches)
    schedule = LambdaLR(optimizer, lambda step: curve(step, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
