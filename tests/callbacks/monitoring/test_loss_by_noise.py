import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.monitoring.loss_by_noise import EDGES, RANGES, LossByNoise
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule, scaled_linear
from ldm.diffusion.time_sampling import Uniform
from ldm.training.diffusion import DiffusionTraining
from tests.callbacks.logged import Logged
from tests.callbacks.tiny import Batches, Tiny, trainer
from tests.closed_form import EVERY_SCHEDULE, schedule_name
from tests.training.tiny import diffusion, fit

Samples = list[tuple[float, float]]  # log-SNR and loss
NAMES = {  # written out, independently of EDGES
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


def recorded(schedule: Schedule) -> tuple[DiffusionTraining, dict[bool, Samples]]:
    """Returns a module, and the samples that it will see, by whether they are seen in training."""
    module = diffusion(schedule=schedule, prediction=Prediction("v"), times=Uniform(schedule), caption_dropout=0.0)
    seen: dict[bool, Samples] = {True: [], False: []}
    losses = module.losses

    def note(batch: dict[str, Any], dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t, loss = losses(batch, dropped)
        ratio = (schedule.alpha(t) / schedule.sigma(t)).square()  # the SNR, computed without the schedule's log_snr
        seen[module.training] += zip(ratio.log().tolist(), loss.tolist(), strict=True)
        return t, loss

    module.losses = note  # type: ignore[method-assign]
    return module, seen


def means(samples: Samples) -> dict[str, float]:
    """Returns the mean loss of each range, computed sample by sample."""
    by_range = defaultdict(list)
    for log_snr, loss in samples:
        name = next(
            name for (low, high), name in NAMES.items() if low <= log_snr < high or (log_snr == math.inf == high)
        )
        by_range[name].append(loss)
    return {name: fmean(losses) for name, losses in by_range.items()}


def losses_by_range(row: dict[str, float], prefix: str) -> dict[str, float]:
    start = f"{prefix}/loss_by_log_snr/"
    return {name.removeprefix(start): value for name, value in row.items() if name.startswith(start)}


def test_ranges_are_named_after_their_edges() -> None:
    assert tuple(NAMES.values()) == RANGES and tuple(low for low, _ in NAMES)[1:] == tuple(EDGES)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
def test_on_every_schedule_each_range_has_the_mean_loss_of_its_samples(tmp_path: Path, schedule: Schedule) -> None:
    logger, (module, seen) = Logged(), recorded(schedule)
    fit(tmp_path, module, 3, batch_size=8, callbacks=[LossByNoise()], logger=logger, log_every_n_steps=3)
    logged = losses_by_range(logger.rows[2], "train")
    assert logged == pytest.approx(means(seen[True])) and len(logged) >= 4


def test_validation_losses_are_split_into_the_same_ranges(tmp_path: Path) -> None:
    logger, (module, seen) = Logged(), recorded(scaled_linear())
    how = {"logger": logger, "val_check_interval": 1, "check_val_every_n_epoch": None}
    fit(tmp_path, module, 3, callbacks=[LossByNoise()], **how)
    sets = [seen[False][6 * step : 6 * step + 6] for step in range(3)]  # six held-out images
    for step, samples in enumerate(sets):
        assert losses_by_range(logger.rows[step], "val/pictures") == pytest.approx(means(samples))
        assert logger.rows[step]["val/pictures/loss"] == pytest.approx(fmean(loss for _, loss in samples))


class Levels(Tiny):
    """Its samples cycle through the given log-SNRs, two per batch."""

    def __init__(self, *levels: float) -> None:
        super().__init__()
        self.levels, self.seen = levels, Samples()

    def training_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:  # type: ignore[override]
        losses = (self.backbone(batch["x"]) - 1).square().mean(1)
        start = 2 * index % len(self.levels)
        log_snr = torch.tensor(self.levels[start : start + 2], dtype=torch.float64)
        self.seen += zip(log_snr.tolist(), losses.tolist(), strict=True)
        return {"loss": losses.mean(), "log_snr": log_snr, "losses": losses.detach()}


def test_ranges_include_their_lower_edge_pure_noise_and_the_clean_image(tmp_path: Path) -> None:
    logger, module = Logged(), Levels(-math.inf, math.inf, -4.0, -4.000001)
    trainer(tmp_path, LossByNoise(), logger=logger, max_steps=2, log_every_n_steps=2).fit(module, Batches())
    assert losses_by_range(logger.rows[1], "train") == pytest.approx(means(module.seen))
    assert list(losses_by_range(logger.rows[1], "train")) == ["below_-8", "-6_to_-4", "-4_to_-2", "above_8"]


def test_the_mean_covers_all_samples_since_the_last_logged_step_across_a_resume(tmp_path: Path) -> None:
    samples: Samples = []
    logger, last = Logged(), tmp_path / "last.ckpt"
    for steps, resume in ((3, None), (4, last)):
        module = Levels(-5.0, 1.0, 1.0, 3.0)
        how = {"logger": logger, "log_every_n_steps": 4, "accumulate_grad_batches": 2, "max_steps": steps}
        trainer(tmp_path, LossByNoise(), Checkpoint(tmp_path), **how).fit(module, Batches(), ckpt_path=resume)
        samples += module.seen
    assert len(samples) == 16 and list(logger.rows) == [3]
    assert losses_by_range(logger.rows[3], "train") == pytest.approx(means(samples))


def test_a_range_without_samples_has_no_loss_and_nan_losses_are_ignored(tmp_path: Path) -> None:
    class Broken(Levels):
        def training_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:  # type: ignore[override]
            out = super().training_step(batch, index)
            return out | {"losses": torch.tensor([math.nan, 0.5])}

    logger = Logged()
    trainer(tmp_path, LossByNoise(), logger=logger, max_steps=1).fit(Broken(1.0, 3.0), Batches())
    assert losses_by_range(logger.rows[0], "train") == {"2_to_4": 0.5}


def test_sums_on_the_cpu_are_moved_to_the_device_before_ranks_reduce_them() -> None:
    """NCCL cannot reduce from the CPU, where the sums of a module without noise levels stay."""
    reduced: list[torch.device] = []

    def reduce(sums: Tensor, reduce_op: str) -> Tensor:
        reduced.append(sums.device)
        return torch.zeros(sums.shape)

    strategy = SimpleNamespace(root_device=torch.device("meta"), reduce=reduce)
    LossByNoise().on_save_checkpoint(SimpleNamespace(strategy=strategy), Tiny(), checkpoint := {})  # type: ignore[arg-type]
    assert [device.type for device in reduced] == ["meta"] and checkpoint["loss_by_noise"].device.type == "cpu"
