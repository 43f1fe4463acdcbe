from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from lightning import LightningModule

from tests.callbacks.logged import Logged
from tests.training import test_autoencoder, test_clip
from tests.training.tiny import diffusion, fit

MODULES = {"diffusion": diffusion, "autoencoder": test_autoencoder.training, "clip": test_clip.training}


def recorded_losses(module: LightningModule) -> list[float]:
    """Returns a list that collects the losses of the batches that the module trains on."""
    seen, step = [], module.training_step

    def note(batch: dict[str, Any], batch_idx: int) -> Any:
        out = step(batch, batch_idx)
        seen.append((out["loss"] if isinstance(out, dict) else out).item())
        return out

    module.training_step = note  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_the_loss_of_a_step_is_the_mean_over_its_batches(tmp_path: Path, make: Callable[[], LightningModule]) -> None:
    logger, module = Logged(), make()
    seen = recorded_losses(module)
    fit(tmp_path, module, 3, batch_size=2, accumulate_grad_batches=2, logger=logger, log_every_n_steps=1)
    expected = [fmean(seen[2 * step : 2 * step + 2]) for step in range(3)]
    assert list(logger.curve("train/loss").values()) == pytest.approx(expected)


def test_the_terms_of_the_autoencoder_loss_add_up_to_it(tmp_path: Path) -> None:
    logger, module = Logged(), test_autoencoder.training(kl_weight=0.5)
    fit(tmp_path, module, 2, batch_size=2, accumulate_grad_batches=2, logger=logger, log_every_n_steps=1)
    for row in logger.rows.values():
        assert row["train/loss"] == pytest.approx(row["train/reconstruction"] + 0.5 * row["train/kl"], rel=1e-5)
