"""Learning-rate curves, as factors of the optimizer's learning rate, and optimizers that follow them."""

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

Curve = Callable[[int, int], float]  # (step, total steps) → factor
Weights = Iterable[nn.Parameter] | Iterable[dict[str, Any]]  # weights, or groups of weights with their own settings
MakeOptimizer = Callable[[Weights], Optimizer]
REMEDY = "resume with the checkpoint's optimizer, or start a new run from its weights with training.start"


def constant(warmup: int = 0, first: float | None = None) -> Curve:
    """Rises linearly to 1 over `warmup` steps from `first` (by default 1 / (warmup + 1)), then stays 1."""
    start = 1 / (warmup + 1) if first is None else first
    return lambda step, total: 1.0 if step >= warmup else start + (1 - start) * step / warmup


def cosine(warmup: int = 0, final: float = 0.0, first: float | None = None) -> Curve:
    """Multiplies `constant` by half a cosine that falls from 1 after the warm-up to `final` at the last step."""
    warm = constant(warmup, first)

    def factor(step: int, total: int) -> float:
        done = _share(step, warmup, total - 1)
        return warm(step, total) * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)

    return factor


def linear(warmup: int = 0, final: float = 0.0, hold: float = 0.0, first: float | None = None) -> Curve:
    """Follows `constant` for the share `hold` of the steps after the warm-up, then falls linearly to `final`."""
    warm = constant(warmup, first)

    def factor(step: int, total: int) -> float:
        start = warmup + hold * max(0, total - 1 - warmup)
        done = _share(step, start, total - 1)
        return warm(step, total) * (1 + (final - 1) * done)

    return factor


def _share(step: int, start: float, last: int) -> float:
    """Returns the share of the way from start to last: 0 before start, 1 after last."""
    return min(1.0, max(0.0, step - start) / (last - start)) if last > start else 0.0


class CurveLR(LambdaLR):
    """Multiplies the learning rate of every parameter group by a curve.

    Its state is only the step, so that a resumed run uses the curve and the learning rates of its own config.
    """

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        rates = [rate * factor(self.last_epoch) for rate, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


def with_curve(make: MakeOptimizer, weights: Weights, curve: Curve, trainer: Trainer) -> OptimizerLRSchedulerConfig:
    """Returns what `configure_optimizers` must return: the optimizer, and a scheduler that follows the curve per step.

    From a checkpoint the optimizer loads the state of each weight, such as moments, but keeps the hyperparameters that
    `make` sets. Raises ValueError if the learning rate is not positive.
    """
    optimizer = make(weights)
    if not all(group["lr"] > 0 for group in optimizer.param_groups):
        raise ValueError(f"optimizer.lr is {optimizer.param_groups[0]['lr']}, but must be positive")
    # Otherwise a fused optimizer would unscale float16 gradients in its step, after clipping, which Lightning rejects.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    optimizer.register_load_state_dict_pre_hook(partial(_keep_hyperparameters, make))
    optimizer.register_load_state_dict_post_hook(distribute_state)
    total = int(trainer.estimated_stepping_batches)
    schedule = CurveLR(optimizer, lambda step: curve(step, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _keep_hyperparameters(make: MakeOptimizer, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the saved state with the new optimizer's hyperparameters, except those that it has `learned`.

    Raises ValueError for the state of a different optimizer, which would only fail with a KeyError in the first step.
    """
    own, old = optimizer.param_groups, saved["param_groups"]
    name = type(optimizer).__name__
    if [len(group["params"]) for group in own] != [len(group["params"]) for group in old]:
        raise ValueError(f"the checkpoint's optimizer groups the weights differently than {name}: {REMEDY}")
    needed = cache(partial(_state_names, make))
    for group, old_group in zip(own, old, strict=True):
        for weight, key in zip(group["params"], old_group["params"], strict=True):
            state = saved["state"].get(key)  # absent for a weight that has had no gradient yet
            if state and (missing := needed(weight.ndim, weight.device) - state.keys()):
                raise ValueError(
                    f"the checkpoint's optimizer state lacks {', '.join(sorted(missing))}, which {name} keeps for each "
                    f"weight under this config: {REMEDY}"
                )
    learned = vars(optimizer).get("learned", ())  # see packaged_optimizers.prodigy
    groups = [
        group | {key: old_group[key] for key in ("params", *learned) if key in old_group}
        for group, old_group in zip(own, old, strict=True)
    ]
    return {**saved, "param_groups": groups}


def _state_names(make: MakeOptimizer, ndim: int, device: torch.device) -> set[str]:
    """Returns the state names that the optimizer keeps for a weight, from a step on a single zero."""
    weight = nn.Parameter(torch.zeros((1,) * ndim, device=device))
    weight.grad = torch.zeros_like(weight)
    optimizer = make([weight])
    optimizer.step(lambda: 0.0)
    return set(optimizer.state[weight])
