"""What tells whether a run is well, and what keeps a bad batch from spoiling it."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.nn.utils import get_total_norm

from ldm.callbacks.steps import is_logged, log_last_step, stepped
from ldm.execution.fsdp import whole
from ldm.files import write_json

NVML = find_spec("pynvml") is not None  # what torch asks about the GPU


class Health(Callback):
    """Leaves out optimizer steps whose loss or gradient is not finite on any rank, and logs how training goes.

    A step left out is counted, and what its batches held goes into `folder`/step_N_rank_R.json; the `max_skipped`-th
    raises FloatingPointError. Overflows that a scaler of float16 gradients deals with do not count. Every
    `trainer.log_every_n_steps` steps it logs the learning rate that the step used, the norms of gradient (before
    clipping), weights (after the step) and update, and the share of time that the GPU works (with nvidia-ml-py
    installed). The update is measured over the n steps since the last logged one, each measuring every n-th weight
    tensor, so that there is never a copy of all weights.
    """

    def __init__(self, folder: str | Path, max_skipped: int = 10) -> None:
        if max_skipped < 1:
            raise ValueError(f"callbacks.health.max_skipped is {max_skipped}, but must be 1 or more")
        self.folder, self.max_skipped = Path(folder), max_skipped
        self.skipped = 0
        self._batches: list[dict[str, Any]] = []  # of this optimizer step
        self._losses: list[Tensor] = []
        self._values: dict[str, Any] = {}  # to be logged with this step
        self._before: dict[Tensor, Tensor] = {}  # by weight, what it was until this step
        self._updates: list[Tensor] = []  # norms of the parts measured since the last logging

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if saved := checkpoint.get("health"):
            self.skipped, self._updates = saved["skipped"], list(saved.get("updates", ()))

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        updates = torch.tensor([float(norm) for norm in self._updates])
        checkpoint["health"] = {"skipped": self.skipped, "updates": updates}

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batches.append({name: batch[name] for name in ("key", "id", "draw") if name in batch})

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The norm is that before clipping, which Lightning does after this; then the next step's rate is set."""
        logged = is_logged(trainer, trainer.global_step + 1)
        self._values = {"lr": float(optimizer.param_groups[0]["lr"])} if logged else {}
        losses, batches = torch.stack(self._losses).float(), self._batches
        self._losses, self._batches = [], []
        norm = _norm([weight.grad for weight in _weights(optimizer) if weight.grad is not None])
        precision = trainer.precision_plugin
        scaled = isinstance(precision, MixedPrecision) and precision.scaler is not None
        finite = bool((losses.sum() + (0 if scaled else norm)).isfinite())
        if trainer.strategy.reduce_boolean_decision(not finite, all=False):
            self._skip(trainer, optimizer, losses, batches)
            return
        self._before = {weight: weight.detach().clone() for weight in _turn(trainer, optimizer)}
        if logged:
            self._values["grad_norm"] = norm

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._before:
            self._updates.append(self._part_of_update())
        if not (is_logged(trainer, trainer.global_step) and stepped(trainer, batch_idx)):
            return
        values, self._values = self._values, {}
        values["skipped"] = self.skipped
        values["weight_norm"] = _norm([weight.detach() for weight in _weights(trainer.optimizers[0])])
        if self._updates:
            values["update_norm"] = get_total_norm(self._updates)
            self._updates = []
        if module.device.type == "cuda" and NVML:
            values["gpu_utilisation"] = torch.cuda.utilization(module.device) / 100
        log_last_step(trainer, {f"train/{name}": float(value) for name, value in values.items()})

    def _part_of_update(self) -> Tensor:
        """The norm of what the step changed in the weights whose turn it is."""
        before, self._before = self._before, {}
        changes = list(before.values())
        torch._foreach_sub_(changes, [weight.detach() for weight in before])
        return _norm(changes).float()

    def _skip(
        self, trainer: Trainer, optimizer: torch.optim.Optimizer, losses: Tensor, batches: list[dict[str, Any]]
    ) -> None:
        """An optimizer does nothing to weights without gradients."""
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        step = trainer.global_step + 1
        file = self.folder / f"step_{step:08}_rank_{trainer.global_rank}.json"
        held = [{name: _plain(values) for name, values in batch.items()} for batch in batches]
        write_json(file, {"step": step, "finite": losses.isfinite().tolist(), "batches": held})
        if self.skipped >= self.max_skipped:
            raise FloatingPointError(
                f"the loss or gradient of {self.skipped} steps was not finite, the last of them step {step}: lower "
                f"optimizer.lr, train with precision=fp32, or look at the samples listed in {self.folder}; the "
                "weights are as they were before that step"
            )
        if trainer.is_global_zero:
            warnings.warn(
                f"STEP {step} WAS LEFT OUT, because its loss or gradient was not finite ({self.skipped} of at most "
                f"{self.max_skipped - 1}): its samples are listed in {file}",
                stacklevel=2,
            )


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _turn(trainer: Trainer, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The weights whose update this step measures: each has one turn from logging to logging."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return _weights(optimizer)[trainer.global_step % every :: every] if every else []


def _norm(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Of all together, over all ranks where each holds a part."""
    return whole(get_total_norm(tensors))


def _plain(values: Any) -> Any:
    return values.tolist() if isinstance(values, Tensor) else values
