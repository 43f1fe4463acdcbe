"""Exponential moving averages (EMA) of the trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm.execution.fsdp import distribute_like, exchange, local_shard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EMA(Callback):
    """average ← average + (1 - decay)·(weight - average) after each optimizer step, computed in float32.

    With `warmup` the decay of the n-th update is min(decay, (1 + n) / (10 + n)), so that the initial weights are soon
    forgotten. The average may be kept on another `device`, such as cpu, and in bfloat16. Validation and tests use it.
    Checkpoints save it as "ema": {weight name: tensor}; on resuming from a checkpoint without it, the average starts
    from the checkpoint's weights.
    """

    def __init__(
        self, decay: float = 0.9999, warmup: bool = True, device: str | None = None, dtype: str = "float32"
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay is {decay}, but must be in [0, 1); to train without an average, set ema=none")
        if dtype not in DTYPES:
            raise ValueError(f"ema.dtype is {dtype}, but must be one of {', '.join(DTYPES)}")
        self.decay, self.warmup = decay, warmup
        self.device, self.dtype = device, DTYPES[dtype]
        self.updates = 0
        self.tracks: list[dict[str, Tensor]] = [{}]
        self._step = 0  # the optimizer step of the last update
        self._pinned: list[Tensor] = []  # copies of the weights, for averages on the CPU
        self._weights: list[Tensor] = []  # the training weights while the averages are swapped in

    @property
    def averages(self) -> dict[str, Tensor]:
        """The average by parameter name; the first one if several are tracked."""
        return self.tracks[0]

    @property
    def about(self) -> dict[str, Any]:
        return {"decay": self.decay, "warmup": self.warmup, "updates": self.updates}

    def decays(self) -> list[float]:
        """Returns the decay of each track at this update, counted from 1."""
        return [min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay]

    @torch.no_grad()
    def update(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Updates the averages with the current values of the trained weights."""
        self.updates += 1
        values = self._values([weight.detach() for weight in weights.values()])
        for track, decay in zip(self.tracks, self.decays(), strict=True):
            averages = list(track.values())
            if self.dtype == torch.float32:
                torch._foreach_lerp_(averages, values, 1 - decay)
            else:
                generator = torch.Generator(averages[0].device).manual_seed(self.updates)
                for average, value in zip(map(local_shard, averages), map(local_shard, values), strict=True):
                    average.copy_(stochastic_round(average.float().lerp_(value, 1 - decay), generator))

    def _values(self, weights: list[Tensor]) -> list[Tensor]:
        """Returns the weights in float32 on the averages' device.

        Weights of a GPU are copied to the CPU through pinned memory, several times as fast as through other memory.
        """
        if self.device != "cpu" or not all(weight.is_cuda and not isinstance(weight, DTensor) for weight in weights):
            return [weight.to(self.device, torch.float32) for weight in weights]
        if not self._pinned:
            self._pinned = [
                torch.empty_like(weight, dtype=torch.float32, device="cpu", pin_memory=True) for weight in weights
            ]
        torch._foreach_copy_(self._pinned, weights, non_blocking=True)
        torch.cuda.synchronize()
        return self._pinned

    @contextmanager
    def swapped(self, module: LightningModule) -> Iterator[None]:
        """Replaces the module's trained weights by the averages inside the context, and restores them on exit."""
        try:
            self._swap_in(module)
            yield
        finally:
            self._swap_out(module)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Moves the averages to the weights' device, where every strategy has placed the weights by now."""
        self._step = trainer.global_step
        for track in self.tracks:
            for name, weight in trainable_weights(module).items():
                start = distribute_like(track[name].to(weight.device), weight) if name in track else weight.detach()
                track[name] = start.to(self.device or weight.device, self.dtype, copy=True)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step != self._step:  # other batches only accumulate gradients
            self._step = trainer.global_step
            self.update(trainable_weights(module))

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_in(module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_out(module)

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_in(module)

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_out(module)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._swap_out(module)

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._weights:
            raise RuntimeError("a checkpoint cannot be saved while the averages are in place of the training weights")
        first, *others = (dict(track) for track in self.tracks)
        checkpoint |= {"ema": first, "ema_others": others}

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = [checkpoint.get("ema", {}), *checkpoint.get("ema_others", [])]
        self.tracks = [dict(track) for track in (*saved, *self.tracks[len(saved) :])][: len(self.tracks)]

    def _swap_in(self, module: LightningModule) -> None:
        if self._weights:
            raise RuntimeError("the averages are already in place of the weights")
        if not self.averages:  # training has not begun
            return
        # An average that already has the parameter's dtype and device is not copied.
        for name, parameter in trainable_weights(module).items():
            self._weights.append(exchange(parameter, self.averages[name].to(parameter)))

    def _swap_out(self, module: LightningModule) -> None:
        # There are fewer weights than parameters if swapping in was interrupted, and none before training starts.
        for parameter, weight in zip(trainable_weights(module).values(), self._weights, strict=False):
            exchange(parameter, weight)
        self._weights = []


def stochastic_round(value: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds float32 to bfloat16, up or down at random so that the expected value is exact.

    Rounding to nearest would lose every update that is smaller than half the spacing of bfloat16.
    """
    low = torch.randint(1 << 16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    bits = value.contiguous().view(torch.int32) + low
    return (bits & ~0xFFFF).view(torch.float32).bfloat16()  # drops the bits that bfloat16 lacks


def trainable_weights(module: LightningModule) -> dict[str, nn.Parameter]:
    """Returns the weights that are trained and averaged, by name."""
    weights: dict[str, nn.Parameter] = module.trainable()  # type: ignore[operator]
    return weights
