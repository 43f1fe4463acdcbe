from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.monitoring.images_seen import ImagesSeen
from tests.callbacks.logged import Logged
from tests.training.tiny import diffusion, fit


def test_images_are_counted_over_accumulated_batches_and_resumed_runs(tmp_path: Path) -> None:
    logger = Logged()
    how = {"logger": logger, "log_every_n_steps": 1, "accumulate_grad_batches": 2, "enable_checkpointing": True}
    fit(tmp_path, diffusion(), 2, batch_size=2, callbacks=[ImagesSeen(), Checkpoint(tmp_path)], **how)
    fit(
        tmp_path,
        diffusion(),
        5,
        tmp_path / "last.ckpt",
        batch_size=2,
        callbacks=[ImagesSeen(), Checkpoint(tmp_path)],
        **how,
    )
    assert logger.curve("train/images_seen") == {0: 4, 1: 8, 2: 12, 3: 16, 4: 20}


def test_the_epoch_is_exact_if_steps_do_not_divide_the_training_set(tmp_path: Path) -> None:
    class Draws(Callback):
        def on_train_batch_start(self, _: Any, __: Any, batch: dict[str, Any], *___: Any) -> None:
            epochs.append(batch["draw"].tolist())

    epochs: list[list[int]] = []
    logger = Logged()
    how = {"logger": logger, "log_every_n_steps": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(tmp_path, diffusion(), 6, batch_size=3, callbacks=[ImagesSeen(), Draws()], **how)  # eight samples
    assert epochs == [[0] * 3, [0] * 3, [0, 0, 1], [1] * 3, [1] * 3, [1, 2, 2]]
    for step, (*_, last) in enumerate(epochs):
        assert logger.rows[step]["epoch"] == pytest.approx((3 * step + 3) / 8)
        assert last < logger.rows[step]["epoch"] <= last + 1
