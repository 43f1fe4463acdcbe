from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from ldm.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from ldm.callbacks.health import Health
from tests.callbacks.tiny import Batches, Tiny, trainer


class Logged(Logger):
    """Keeps what is logged, by step."""

    name, version = "logged", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.setdefault(step, {}).update(metrics)


class Norms(Callback):
    """The gradient's norm as the optimizer would see it without clipping."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, _: Any, module: Any, __: Any) -> None:
        gradients = [p.grad.flatten() for p in module.unet.parameters()]
        self.seen.append(torch.cat(gradients).norm().item())


def test_it_logs_the_gradient_norm_before_clipping_and_the_learning_rate(tmp_path: Path) -> None:
    logger, norms = Logged(), Norms()
    run = trainer(tmp_path, Health(), norms, logger=logger, gradient_clip_val=1e-3, log_every_n_steps=2)
    run.fit(Tiny(), Batches())
    assert list(logger.rows) == [1, 3]  # Lightning's numbers of the second and fourth step
    assert [row["train/grad_norm"] for row in logger.rows.values()] == pytest.approx(norms.seen[1::2])
    assert all(row["train/lr"] == pytest.approx(0.1) for row in logger.rows.values())


def test_a_loss_that_is_no_number_ends_the_run_and_names_its_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, Health(), max_steps=6, log_every_n_steps=5)
    with pytest.raises(FloatingPointError, match="loss of step 3 is not finite"):
        run.fit(Tiny(broken_at=2), Batches())
    assert run.global_step == 5  # no step waits for the device, so it is seen when logs are due


def test_a_broken_state_is_never_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path, Health(), Checkpoint(tmp_path, every_n_train_steps=2), log_every_n_steps=50)
    with pytest.raises(FloatingPointError, match="loss of step 4"):
        run.fit(Tiny(broken_at=3), Batches())
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2
