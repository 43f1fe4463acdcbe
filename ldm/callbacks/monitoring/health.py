"""Skips optimizer steps with a non-finite loss or gradient, and logs norms and learning rate."""

import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce
from torch.nn.utils import get_total_norm

from ldm.callbacks.full_disk import tolerate_full_disk
from ldm.callbacks.steps import is_logged, log_last_step, stepped
from ldm.execution.fsdp import full_tensor
from ldm.files import write_json

NVML = find_spec("pynvml") is not None  # torch.cuda.utilization requires it
MAX_UNREAD = 100  # steps


@dataclass(frozen=True)
class Step:
    """An optimizer step, counted from 1; `broken` is 1 if a loss or gradient is not finite on any rank, else 0."""

    number: int
    broken: Tensor
    losses: Tensor
    batches: list[dict[str, Any]]


class Health(Callback):
    """Skips optimizer steps whose loss or gradient is not finite on any rank, and logs training statistics.

    On a GPU Muon and fused Adam and AdamW skip such a step by themselves, and it is reported with the next step that
    is logged, validated or saved, because reading from the GPU in every step would wait for it. The samples of a
    skipped step are listed in `folder`/step_N_rank_R.json, and the `max_skipped`-th skipped step raises
    FloatingPointError. Overflows that a float16 gradient scaler handles do not count.

    Every `trainer.log_every_n_steps` steps it logs the learning rate of the step, the norms of the gradient (before
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
        self._unread: list[Step] = []  # whose `broken` was not read back from the device
        self._values: dict[str, Any] = {}  # to log with this step
        self._before: dict[Tensor, Tensor] = {}  # weight → its value before this step
        self._updates: list[Tensor] = []  # update norms of the weights measured since the last logged step

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if saved := checkpoint.get("health"):
            self.skipped, self._updates = saved["skipped"], list(saved.get("updates", ()))

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._read(trainer)
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
        broken = (~(losses.sum() + (0 if scaled else norm)).isfinite()).float()
        if trainer.world_size > 1:
            all_reduce(broken, ReduceOp.MAX)  # unlike Lightning's reductions, this does not wait for the device
        self._unread.append(Step(trainer.global_step + 1, broken, losses, batches))
        can_wait = _skips_by_itself(optimizer) and _is_slow_to_read(broken) and len(self._unread) < MAX_UNREAD
        if _skips_by_itself(optimizer):
            optimizer.found_inf = broken if can_wait else None  # type: ignore[attr-defined]
        if (logged or not can_wait) and self._read(trainer):
            optimizer.zero_grad(set_to_none=True)  # an optimizer ignores weights without a gradient
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
            with suppress(Exception):  # NVML refuses, with various errors, parts of a GPU and some containers
                values["gpu_utilisation"] = torch.cuda.utilization(module.device) / 100
        log_last_step(trainer, {f"train/{name}": float(value) for name, value in values.items()})

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._read(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._read(trainer)

    def _update_norm(self) -> Tensor:
        """Returns the norm of the step's change to the weights that it measures."""
        before, self._before = self._before, {}
        changes = list(before.values())
        torch._foreach_sub_(changes, [weight.detach() for weight in before])
        return _norm(changes).float()

    def _read(self, trainer: Trainer) -> bool:
        """Reports the skipped ones among the unread steps, and returns whether the last of them is."""
        steps, self._unread = self._unread, []
        broken = torch.stack([step.broken for step in steps]).tolist() if steps else []
        for step, is_broken in zip(steps, broken, strict=True):
            if is_broken:
                self._report(trainer, step)
        return bool(broken and broken[-1])

    def _report(self, trainer: Trainer, skipped: Step) -> None:
        self.skipped += 1
        step = skipped.number
        file = self.folder / f"step_{step:08}_rank_{trainer.global_rank}.json"
        samples = [{name: _plain(values) for name, values in batch.items()} for batch in skipped.batches]
        with tolerate_full_disk(f"the list of the samples of skipped step {step}"):
            write_json(file, {"step": step, "finite": skipped.losses.isfinite().tolist(), "batches": samples})
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


def _skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the optimizer leaves weights and state unchanged if its `found_inf` is 1 (see GradScaler)."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return getattr(optimizer, "skips_broken_steps", False) or (
        fused and type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    )


def _is_slow_to_read(flag: Tensor) -> bool:
    return flag.device.type != "cpu"


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
