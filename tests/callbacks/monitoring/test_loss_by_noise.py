import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.monitoring.loss_by_noise import EDGES, RANGES, LossByNoise
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Flow, Schedule, cosine, linear, scaled_linear, zero_terminal_snr
from ldm.diffusion.time_sampling import Uniform
from ldm.training.diffusion import DiffusionTraining
from tests.callbacks.logged import Logged
from tests.callbacks.tiny import Batches, Tiny, trainer
from tests.training.tiny import diffusion, fit

Samples = list[tuple[float, float]]  # log-SNR and loss
NAMES = {  # written out, so that another edge is another name
    (-math.inf, -8): "below_-8",
    (-8, -6): "-8_to_-6",
    (-6, -4): "-6_to_-4",
    (-4, -2): "-4_to_-2",
    (-2, 0): "-2_to_0",
    (0, 2): "0_to_2",
    (2, 4): "2_to_4",
    (4, 6): "4_to_6",
    (6, 8): "6_to_8",
    (8, math.inf): "above_8",
}


def of(schedule: Schedule) -> tuple[DiffusionTraining, dict[bool, Samples]]:
    """A module, and the samples that it will have seen, by whether in training."""
    module = diffusion(schedule=schedule, prediction=Prediction("v"), times=Uniform(schedule), caption_dropout=0.0)
    seen: dict[bool, Samples] = {True: [], False: []}
    losses = module.losses

    def note(batch: dict[str, Any], dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t, found = losses(batch, dropped)
        ratio = (schedule.alpha(t) / schedule.sigma(t)).square()  # SNR, by another way than the schedule's own
        seen[module.training] += zip(ratio.log().tolist(), found.tolist(), strict=True)
        return t, found

    module.losses = note  # type: ignore[method-assign]
    return module, seen


def means(samples: Samples) -> dict[str, float]:
    """By range, sample by sample."""
    found = defaultdict(list)
    for log_snr, loss in samples:
        name = next(
            name for (low, high), name in NAMES.items() if low <= log_snr < high or (log_snr == math.inf == high)
        )
        found[name].append(loss)
    return {name: fmean(losses) for name, losses in found.items()}


def parts(row: dict[str, float], prefix: str) -> dict[str, float]:
    start = f"{prefix}/loss_by_log_snr/"
    return {name.removeprefix(start): value for name, value in row.items() if name.startswith(start)}


def test_the_ranges_have_the_names_of_their_edges() -> None:
    assert tuple(NAMES.values()) == RANGES and tuple(low for low, _ in NAMES)[1:] == EDGES


@pytest.mark.parametrize(
    "schedule",
    [scaled_linear(), linear(), cosine(), zero_terminal_snr(scaled_linear()), Flow()],
    ids=["scaled_linear", "linear", "cosine", "zero_terminal_snr", "flow"],
)
def test_on_every_schedule_each_range_has_the_mean_loss_of_its_samples(tmp_path: Path, schedule: Schedule) -> None:
    logger, (module, seen) = Logged(), of(schedule)
    fit(tmp_path, module, 8, batch_size=8, callbacks=[LossByNoise()], logger=logger, log_every_n_steps=8)
    found = parts(logger.rows[7], "train")
    assert found == pytest.approx(means(seen[True])) and len(found) >= 5


def test_validation_losses_are_divided_like_those_of_training(tmp_path: Path) -> None:
    logger, (module, seen) = Logged(), of(scaled_linear())
    how = {"logger": logger, "val_check_interval": 1, "check_val_every_n_epoch": None}
    fit(tmp_path, module, 3, callbacks=[LossByNoise()], **how)
    sets = [seen[False][6 * step : 6 * step + 6] for step in range(3)]  # of the six pictures that are held out
    for step, samples in enumerate(sets):
        assert parts(logger.rows[step], "val/pictures") == pytest.approx(means(samples))
        assert logger.rows[step]["val/pictures/loss"] == pytest.approx(fmean(loss for _, loss in samples))


class Levels(Tiny):
    """Its samples have the log-SNRs given, two a batch, over and over."""

    def __init__(self, *levels: float) -> None:
        super().__init__()
        self.levels, self.seen = levels, Samples()

    def training_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:  # type: ignore[override]
        losses = (self.backbone(batch["x"]) - 1).square().mean(1)
        place = 2 * index % len(self.levels)
        log_snr = torch.tensor(self.levels[place : place + 2], dtype=torch.float64)
        self.seen += zip(log_snr.tolist(), losses.tolist(), strict=True)
        return {"loss": losses.mean(), "log_snr": log_snr, "losses": losses.detach()}


def test_pure_noise_and_the_clean_image_have_a_range_and_an_edge_belongs_to_the_upper_one(tmp_path: Path) -> None:
    logger, module = Logged(), Levels(-math.inf, math.inf, -4.0, -4.000001)
    trainer(tmp_path, LossByNoise(), logger=logger, max_steps=2, log_every_n_steps=2).fit(module, Batches())
    assert parts(logger.rows[1], "train") == pytest.approx(means(module.seen))
    assert list(parts(logger.rows[1], "train")) == ["below_-8", "-6_to_-4", "-4_to_-2", "above_8"]


def test_the_mean_is_over_all_samples_since_the_last_logged_step_also_after_a_resume(tmp_path: Path) -> None:
    samples: Samples = []
    logger, last = Logged(), tmp_path / "last.ckpt"
    for steps, resume in ((3, None), (4, last)):
        module = Levels(-5.0, 1.0, 1.0, 3.0)
        how = {"logger": logger, "log_every_n_steps": 4, "accumulate_grad_batches": 2, "max_steps": steps}
        trainer(tmp_path, LossByNoise(), Checkpoint(tmp_path), **how).fit(module, Batches(), ckpt_path=resume)
        samples += module.seen
    assert len(samples) == 16 and list(logger.rows) == [3]
    assert parts(logger.rows[3], "train") == pytest.approx(means(samples))


def test_a_range_without_samples_has_no_loss_and_a_loss_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    class Broken(Levels):
        def training_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:  # type: ignore[override]
            out = super().training_step(batch, index)
            return out | {"losses": torch.tensor([math.nan, 0.5])}

    logger = Logged()
    trainer(tmp_path, LossByNoise(), logger=logger, max_steps=1).fit(Broken(1.0, 3.0), Batches())
    assert parts(logger.rows[0], "train") == {"2_to_4": 0.5}
