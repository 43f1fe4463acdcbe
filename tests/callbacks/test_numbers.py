"""Compares all values that a run logs on one process, on two ranks, and after resuming."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.monitoring.health import Health
from ldm.callbacks.monitoring.images_seen import ImagesSeen
from ldm.callbacks.monitoring.loss_by_noise import LossByNoise
from ldm.callbacks.monitoring.metrics import Metrics
from ldm.callbacks.monitoring.progress import Progress
from ldm.callbacks.monitoring.scalar_table import ScalarTable
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.report.runs import Curve, read_scalars
from ldm.training.diffusion import DiffusionTraining
from ldm.training.optim import cosine
from tests.callbacks.ranks import train_on_two
from tests.training.tiny import diffusion, fit

STEPS, BROKEN = 5, 3  # BROKEN is the epoch in which one sample's loss is NaN
TIMED = {"train/images_per_second", "train/data_wait"}
SGD = partial(torch.optim.SGD, lr=1e-2)  # unlike AdamW, it does not amplify rounding differences


def module() -> DiffusionTraining:
    training = diffusion(optimizer=SGD, lr=cosine(warmup=2))
    losses = training.losses

    def broken(batch: dict[str, Any], dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t, loss = losses(batch, dropped)
        return t, loss.masked_fill((batch["id"] == 5) & (batch["draw"] == BROKEN), torch.nan)

    training.losses = broken  # type: ignore[method-assign]
    return training


def train(folder: Path, batch_size: int, resume: Path | None = None, **how: Any) -> None:
    """Trains STEPS steps, each on all eight samples."""
    callbacks = [
        *(EMA(0.5), Throughput(), Progress(), ImagesSeen(), Health(folder / "skipped"), LossByNoise(), Metrics(folder)),
        Checkpoint(folder / "checkpoints", every_n_train_steps=1, keep=9),
    ]
    logger = ScalarTable(folder)
    every = {"log_every_n_steps": 1, "val_check_interval": 4, "check_val_every_n_epoch": None}
    shown = {"enable_checkpointing": True, "enable_progress_bar": True}
    fit(folder, module(), STEPS, resume, batch_size, callbacks=callbacks, logger=logger, **every, **shown, **how)


def numbers(folder: Path) -> dict[str, Curve]:
    return {name: curve for name, curve in read_scalars(folder).items() if name not in TIMED}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    with pytest.warns(UserWarning, match="step 4 was skipped"):
        train(folder, 4, accumulate_grad_batches=2)
    return folder


def test_a_run_logs_all_values_and_a_skipped_step_has_neither_loss_nor_norms(straight: Path) -> None:
    curves = numbers(straight)
    everywhere, trained = list(range(STEPS)), [0, 1, 2, 4]
    for name, steps in (
        *((f"train/{name}", everywhere) for name in ("lr", "skipped", "weight_norm", "images_seen")),
        *((f"train/{name}", trained) for name in ("loss", "grad_norm", "update_norm")),
        ("epoch", everywhere),
        ("val/pictures/loss", [1, 3]),
    ):
        assert curves[name].steps == steps, name
    assert curves["train/skipped"].values == [0, 0, 0, 1, 1]
    assert curves["train/images_seen"].values == [8, 16, 24, 32, 40]
    assert curves["epoch"].values == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_two_ranks_log_the_values_of_one_process_on_the_same_samples(straight: Path, tmp_path: Path) -> None:
    def work(_: int) -> None:
        train(tmp_path, 2, accumulate_grad_batches=2, devices=2, strategy="ddp")

    codes, stderr = train_on_two(tmp_path, work)
    assert codes == [0, 0], stderr
    ours, theirs = numbers(tmp_path), numbers(straight)
    assert ours.keys() == theirs.keys()
    for name, curve in theirs.items():
        assert ours[name].steps == curve.steps, name
        assert ours[name].values == pytest.approx(curve.values, rel=1e-5), name


@pytest.mark.parametrize("step", [1, 2, 4])  # between validations, right before one, and after the skipped step
def test_a_resumed_run_logs_the_values_of_an_uninterrupted_run(straight: Path, tmp_path: Path, step: int) -> None:
    train(tmp_path, 4, straight / "checkpoints" / f"step_{step:08}.ckpt", accumulate_grad_batches=2)
    for name, curve in numbers(straight).items():
        rest = [(at, value) for at, value in zip(curve.steps, curve.values, strict=True) if at >= step]
        resumed = numbers(tmp_path).get(name, Curve([], []))
        logged = [(at, value) for at, value in zip(resumed.steps, resumed.values, strict=True) if at >= step]
        assert logged == rest, name
