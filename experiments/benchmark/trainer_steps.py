"""Runs the Trainer with the callbacks of a run on random latents, and times its steps."""

import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import Dataset

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO
from ldm.callbacks.monitoring.health import Health
from ldm.callbacks.monitoring.progress import Progress
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.data.loading.datamodule import DataModule
from ldm.training.diffusion import DiffusionTraining

Clock = Callable[[], float]


class Latents(Dataset[dict[str, Any]]):
    """Random moments with latents of `side` x `side`, each with a caption."""

    def __init__(self, count: int, side: int) -> None:
        self.moments = torch.randn(count, 8, side, side, generator=torch.Generator().manual_seed(0)).half()

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key[1] if isinstance(key, tuple) else key
        return {"moments": self.moments[index], "caption": f"a red circle, number {index}", "id": index}


class Times(Callback):
    """Records when each step started."""

    def __init__(self, now: Clock) -> None:
        self.now = now
        self.began: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.began.append(self.now())


def trainer_steps(
    module: DiffusionTraining, data: Latents, batch: int, steps: int, now: Clock, **settings: Any
) -> list[float]:
    """Returns the seconds of each of `steps` steps by the clock `now`; `settings` are the Trainer's."""
    times = Times(now)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            devices=1,
            max_steps=steps + 1,
            gradient_clip_val=1.0,
            log_every_n_steps=10,
            callbacks=[times, Progress(), Throughput(), Health(Path(folder)), EMA()],
            logger=TensorBoardLogger(folder),
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            use_distributed_sampler=False,
            **settings,
        )
        trainer.fit(module, DataModule(data, {}, batch_size=batch))
    return [end - begin for begin, end in pairwise(times.began)]
