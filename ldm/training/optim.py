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


def constant(warmup: int = 0, first: float | None = None) -> Curve:
    """Linear over `warmup` steps, from `first` (by default one part in warmup + 1), then 1."""
    begin = 1 / (warmup + 1) if first is None else first
    return lambda step, total: 1.0 if step >= warmup else begin + (1 - begin) * step / warmup


def cosine(warmup: int = 0, final: float = 0.0, first: float | None = None) -> Curve:
    """`constant`, times half a cosine from 1 at the start down to `final` at the last step."""
    risen = constant(warmup, first)

    def factor(step: int, total: int) -> float:
        done = _share(step, warmup, total - 1)
        return risen(step, total) * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)

    return factor


def linear(warmup: int = 0, final: float = 0.0, hold: float = 0.0, first: float | None = None) -> Curve:
    """`constant` for the share `hold` of the steps, then a line down to `final` at the last step."""
    risen = constant(warmup, first)

    def factor(step: int, total: int) -> float:
        start = warmup + hold * max(0, total - 1 - warmup)
        done = _share(step, start, total - 1)
        return risen(step, total) * (1 + (final - 1) * done)

    return factor


def _share(step: int, start: float, last: int) -> float:
    """How much of the way from start to last is done: 0 until the one, 1 from the other on."""
    return min(1.0, max(0.0, step - start) / (last - start)) if last > start else 0.0


def with_curve(optimizer: Optimizer, curve: Curve, trainer: Trainer) -> OptimizerLRSchedulerConfig:
    """What `configure_optimizers` returns: the optimizer, its rate following the curve step by step.

    Raises ValueError for a rate that is not positive, with which nothing would be learned.
    """
    if not all(group["lr"] > 0 for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer.lr is {optimizer.param_groups[0]['lr']}, but nothing is learned unless it is positive"
        )
    # Else a fused one would undo float16's loss scale within its step, too late for clipping, which Lightning refuses.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    total = int(trainer.estimated_stepping_batches)
    schedule = LambdaLR(optimizer, lambda step: curve(step, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
