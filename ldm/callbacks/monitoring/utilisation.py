"""Logs the arithmetic that training achieves, and the GPU's memory."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.callbacks.find import find
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.callbacks.steps import is_logged, stepped

Peak = Callable[[str], float | None]


class Utilisation(Callback):
    """Logs train/flops_per_second of all ranks, train/mfu, train/gpu_memory and train/gpu_memory_reserved.

    FLOP/s are `flops` of an image, forward and backward, times the images per second that a Throughput callback before
    this one measures. MFU is their share of the peak of all GPUs, if `peak` knows it by the GPU's name. The memory is
    the largest of any rank, in GiB, since the last logged step. Without a GPU only FLOP/s are logged, and without
    `flops` only memory.
    """

    def __init__(self, flops: float | None, peak: Peak) -> None:
        self.flops, self.peak = flops, peak

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not (is_logged(trainer, trainer.global_step) and stepped(trainer, batch_idx)):
            return
        device, speed = trainer.strategy.root_device, find(trainer, Throughput)
        if self.flops and speed is not None:
            achieved = self.flops * speed.rate
            module.log("train/flops_per_second", achieved)
            peak = self.peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
            if peak:
                module.log("train/mfu", achieved / (peak * trainer.world_size))
        if device.type == "cuda":
            for name, nbytes in (
                ("gpu_memory", torch.cuda.max_memory_allocated(device)),
                ("gpu_memory_reserved", torch.cuda.max_memory_reserved(device)),
            ):
                module.log(f"train/{name}", nbytes / 2**30, sync_dist=True, reduce_fx="max")
            torch.cuda.reset_peak_memory_stats(device)
