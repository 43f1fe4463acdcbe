"""Learning-rate curves, as factors of the optimizer's rate."""

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.execution.fsdp import distribute_state

Curve = Callable[[int, int], float]  # (step, of how many) → factor
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
REMEDY = "resume with the optimizer of the checkpoint, or start a new run from its weights with training.start"


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


class CurveLR(LambdaLR):
    """Multiplies the rate of every group of the optimizer by a curve.

    Its state is the step alone, so that a resumed run follows the curve, and starts from the rates, of its own config.
    """

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        rates = [rate * factor(self.last_epoch) for rate, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


def with_curve(
    make: MakeOptimizer, weights: Iterable[nn.Parameter], curve: Curve, trainer: Trainer
) -> OptimizerLRSchedulerConfig:
    """What `configure_optimizers` returns: the optimizer, its rate following the curve step by step.

    Of a checkpoint the optimizer takes over what it holds for each weight, such as moments; its hyperparameters stay
    those that `make` sets. Raises ValueError for a rate that is not positive, with which nothing would be learned.
    """
    optimizer = make(weights)
    if not all(group["lr"] > 0 for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer.lr is {optimizer.param_groups[0]['lr']}, but nothing is learned unless it is positive"
        )
    # Else a fused one would undo float16's loss scale within its step, too late for clipping, which Lightning refuses.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    optimizer.register_load_state_dict_pre_hook(partial(_keep_hyperparameters, make))
    optimizer.register_load_state_dict_post_hook(distribute_state)
    total = int(trainer.estimated_stepping_batches)
    schedule = CurveLR(optimizer, lambda step: curve(step, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _keep_hyperparameters(make: MakeOptimizer, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved state with the optimizer's own hyperparameters. Raises ValueError for the state of another optimizer.

    Missing entries would only show as a KeyError within the first step.
    """
    own, old = optimizer.param_groups, saved["param_groups"]
    name = type(optimizer).__name__
    if [len(group["params"]) for group in own] != [len(group["params"]) for group in old]:
        raise ValueError(f"the checkpoint's optimizer groups the weights in another way than {name} does: {REMEDY}")
    needed = cache(partial(_state_names, make))
    for group, old_group in zip(own, old, strict=True):
        for weight, key in zip(group["params"], old_group["params"], strict=True):
            state = saved["state"].get(key)  # none for a weight that has had no gradient yet
            if state and (missing := needed(weight.ndim, weight.device) - state.keys()):
                raise ValueError(
                    f"the checkpoint's optimizer state lacks {', '.join(sorted(missing))}, which {name} keeps for each "
                    f"weight under this config: {REMEDY}"
                )
    groups = [group | {"params": old_group["params"]} for group, old_group in zip(own, old, strict=True)]
    return {**saved, "param_groups": groups}


def _state_names(make: MakeOptimizer, ndim: int, device: torch.device) -> set[str]:
    """What such an optimizer keeps for a weight, found by a step on a weight of one zero."""
    weight = nn.Parameter(torch.zeros((1,) * ndim, device=device))
    weight.grad = torch.zeros_like(weight)
    optimizer = make([weight])
    optimizer.step(lambda: 0.0)
    return set(optimizer.state[weight])
