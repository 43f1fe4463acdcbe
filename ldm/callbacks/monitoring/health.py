"""Skips optimizer steps with a non-finite loss or gradient, and logs norms and learning rate."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.nn.utils import get_total_norm

from ldm.callbacks.full_disk import tolerate_full_disk
from ldm.callbacks.steps import is_logged, log_last_step, stepped
from ldm.execution.fsdp import full_tensor
from ldm.files import write_json

NVML = find_spec("pynvml") is not None  # torch.cuda.utilization requires it


class Health(Callback):
    """Skips optimizer steps whose loss or gradient is not finite on any rank, and logs training statistics.

    The samples of a skipped step are listed in `folder`/step_N_rank_R.json, and the `max_skipped`-th skipped step
    raises FloatingPointError. Overflows that a float16 gradient scaler handles do not count. Every
    `trainer.log_every_n_steps` steps it logs the learning rate of the step, the norms of the gradient (before
    clipping), the weights (after the step) and the update, and the GPU utilisation (if nvidia-ml-py is installed). The
    update norm accumulates over the n steps since the last logged one, each measuring every n-th weight tensor, so
    that the weights are never all copied at once.
    """

    def __init__(self, folder: str | Path, max_skipped: int = 10) -> None:
        if max_skipped < 1:
            raise ValueError(f"callbacks.health.max_skipped is {max_skipped}, but must be 1 or more")
        self.folder, self.max_skipped = Path(folder), max_skipped
        self.skipped = 0
        self._batches: list[dict[str, Any]] = []  # of this optimizer step
        self._losses: list[Tensor] = []
        self._values: dict[str, Any] = {}  # to log with this step
        self._before: dict[Tensor, Tensor] = {}  # weight → its value before this step
        self._updates: list[Tensor] = []  # update norms of the weights measured since the last logged step

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
        """Runs before Lightning clips gradients and before the learning rate of the next step is set."""
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
        self._before = {weight: weight.detach().clone() for weight in _measured_weights(trainer, optimizer)}
        if logged:
            self._values["grad_norm"] = norm

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._before:
            self._updates.append(self._update_norm())
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

    def _update_norm(self) -> Tensor:
        """Returns the norm of the step's change to the weights that it measures."""
        before, self._before = self._before, {}
        changes = list(before.values())
        torch._foreach_sub_(changes, [weight.detach() for weight in before])
        return _norm(changes).float()

    def _skip(
        self, trainer: Trainer, optimizer: torch.optim.Optimizer, losses: Tensor, batches: list[dict[str, Any]]
    ) -> None:
        """Skips the step by removing the gradients: an optimizer ignores weights without one."""
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        step = trainer.global_step + 1
        file = self.folder / f"step_{step:08}_rank_{trainer.global_rank}.json"
        samples = [{name: _plain(values) for name, values in batch.items()} for batch in batches]
        with tolerate_full_disk(f"the list of the samples of skipped step {step}"):
            write_json(file, {"step": step, "finite": losses.isfinite().tolist(), "batches": samples})
        if self.skipped >= self.max_skipped:
            raise FloatingPointError(
                f"the loss or gradient of {self.skipped} steps was not finite, most recently of step {step}, which "
                f"left the weights unchanged: lower optimizer.lr, train with precision=fp32, or inspect the samples "
                f"listed in {self.folder}"
            )
        if trainer.is_global_zero:
            warnings.warn(
                f"step {step} was skipped because its loss or gradient was not finite ({self.skipped} of at most "
                f"{self.max_skipped - 1} skipped steps): its samples are listed in {file}",
                stacklevel=2,
            )


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _measured_weights(trainer: Trainer, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Returns the weights whose update this step measures: each weight once between two logged steps."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return _weights(optimizer)[trainer.global_step % every :: every] if every else []


def _norm(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Returns the joint norm of all tensors, over all ranks if they are sharded."""
    return full_tensor(get_total_norm(tensors))


def _plain(values: Any) -> Any:
    return values.tolist() if isinstance(values, Tensor) else values
