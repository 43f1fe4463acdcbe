"""Measures how long a checkpoint blocks training, and how much it delays its end, relative to the write.

    ldm bench checkpoint --json FILE

Runs with AdamW alternate with and without checkpoints, in one thread; a file is written while training continues. The
first checkpoint of a run is not counted, because it allocates the memory into which all others are copied.
"""

import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO, Checkpoint

WEIGHTS, EVERY, SAVES, ROUNDS = 64, 16, 3, 3  # MiB of weights; AdamW's moments make it three times as much
STEPS = EVERY * (SAVES + 1) + EVERY // 2


class Timed(Checkpoint):
    """Records how long training waited for each checkpoint, and how long each took to write."""

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__(folder, every)
        self.waits: list[float] = []
        self.writes: list[float] = []

    def _copy(self, trainer: Trainer) -> None:
        began = time.perf_counter()
        super()._copy(trainer)
        self.waits.append(time.perf_counter() - began)

    def _publish(self, path: Path, checkpoint: dict[str, Any]) -> None:
        began = time.perf_counter()
        super()._publish(path, checkpoint)
        self.writes.append(time.perf_counter() - began)


class Work(LightningModule):
    """A network with many weights and little computation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(WEIGHTS // 4)))

    def training_step(self, x: Tensor, _: int) -> Tensor:
        loss: Tensor = self.layers(x).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


class Clock(Callback):
    """Records when steps started, after the first checkpoint."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= EVERY:
            self.began.append(time.perf_counter())


def fit(folder: Path, every: int) -> tuple[Timed, float]:
    """Returns a run's checkpoints, and the seconds of all steps after the first one."""
    checkpoint, clock = Timed(folder, every), Clock()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[clock, checkpoint],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Work(), DataLoader(torch.randn(STEPS, 64, 1024), batch_size=None))  # type: ignore[arg-type]
    return checkpoint, clock.began[-1] - clock.began[0]


def runs() -> Iterator[tuple[list[float], list[float], float]]:
    """Yields, for each round, seconds of waiting and of writing per checkpoint, and the mean delay of training."""
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as name:
            saved, longer = fit(Path(name) / "with", EVERY)
            plain = fit(Path(name) / "without", 10 * STEPS)[1]
        yield saved.waits[1 : SAVES + 1], saved.writes[1 : SAVES + 1], (longer - plain) / SAVES


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    waits, writes, longer = zip(*runs(), strict=True)
    still, writing = (median(chain.from_iterable(times)) for times in (waits, writes))
    later = median(longer)
    print(f"training waits {1000 * still:.0f} ms, {still / writing:.1%} of the {writing:.2f} s of a write")
    print(f"and ends {1000 * later:.0f} ms later, {later / writing:.1%} of a write, because they share the machine")
    return {
        "mebibytes": 3 * WEIGHTS,
        "checkpoints": ROUNDS * SAVES,
        "standing_still_seconds": still,
        "writing_seconds": writing,
        "later_seconds": later,
        "standing_still_over_writing": still / writing,
        "later_over_writing": later / writing,
        "device": "CPU, one thread to compute and one to write",
        "versions": {"torch": torch.__version__},
    }
