import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.monitoring.health import Health
from tests.callbacks.logged import Logged
from tests.callbacks.tiny import Batches, Tiny, trainer
from tests.small_disk import fill, small_disk


class Norms(Callback):
    """Records the norm of the gradient before clipping."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, _: Any, module: Any, __: Any) -> None:
        gradients = [p.grad.flatten() for p in module.backbone.parameters()]
        self.seen.append(torch.cat(gradients).norm().item())


def test_health_logs_the_gradient_norm_before_clipping_and_the_learning_rate(tmp_path: Path) -> None:
    logger, norms = Logged(), Norms()
    health = Health(tmp_path)
    run = trainer(tmp_path, health, norms, logger=logger, gradient_clip_val=1e-3, log_every_n_steps=2)
    run.fit(Tiny(), Batches())
    assert list(logger.rows) == [1, 3]  # Lightning counts steps from 0
    assert [row["train/grad_norm"] for row in logger.rows.values()] == pytest.approx(norms.seen[1::2])
    assert all(row["train/lr"] == pytest.approx(0.1) for row in logger.rows.values())


class Falling(Tiny):
    """Halves the learning rate after every step; `used` records the rate of each step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.used: list[float] = []
        optimizer.register_step_pre_hook(lambda stepped, *_: self.used.append(stepped.param_groups[0]["lr"]))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_logged_learning_rate_is_the_one_that_the_step_used(tmp_path: Path, accumulation: int) -> None:
    first, second, logger = Falling(), Falling(), Logged()
    for module, steps, last in ((first, 2, None), (second, 5, tmp_path / "last.ckpt")):
        callbacks = Health(tmp_path), Checkpoint(tmp_path)
        how = {"logger": logger, "accumulate_grad_batches": accumulation, "max_steps": steps}
        trainer(tmp_path, *callbacks, **how).fit(module, Batches(), ckpt_path=last)
    assert first.used + second.used == [0.1 * 0.5**step for step in range(5)]
    assert list(logger.curve("train/lr").values()) == first.used + second.used


def test_health_logs_the_norms_of_the_weights_and_of_the_update(tmp_path: Path) -> None:
    class Weights(Callback):
        def on_train_start(self, _: Any, module: Any) -> None:
            seen.append(module.weights())

        def on_train_batch_end(self, _: Any, module: Any, *__: Any) -> None:
            seen.append(module.weights())

    seen: list[Tensor] = []
    logger = Logged()
    trainer(tmp_path, Health(tmp_path), Weights(), logger=logger).fit(Tiny(), Batches())
    for row, before, after in zip(logger.rows.values(), seen[:-1], seen[1:], strict=True):
        assert row["train/weight_norm"] == pytest.approx(after.norm().item())
        assert row["train/update_norm"] == pytest.approx((after - before).norm().item(), rel=1e-4)


def test_each_weight_is_measured_once_between_logged_steps_also_across_a_resume(tmp_path: Path) -> None:
    class Weights(Callback):
        def on_train_start(self, _: Any, module: Any) -> None:
            seen.append((module.backbone.weight.detach().clone(), module.backbone.bias.detach().clone()))

        def on_train_batch_end(self, *run_and_module: Any) -> None:
            self.on_train_start(*run_and_module[:2])

    def fit(steps: int, resume: Path | None = None) -> dict[int, dict[str, float]]:
        logger = Logged()
        callbacks = Health(tmp_path), Weights(), Checkpoint(tmp_path)
        run = trainer(tmp_path, *callbacks, logger=logger, log_every_n_steps=2, max_steps=steps)
        run.fit(Tiny(), Batches(), ckpt_path=resume)
        return logger.rows

    seen: list[tuple[Tensor, Tensor]] = []
    fit(3)
    seen.pop()
    row = fit(4, tmp_path / "last.ckpt")[3]
    change_of_weight, change_of_bias = seen[3][0] - seen[2][0], seen[4][1] - seen[3][1]
    expected = torch.cat([change_of_weight.flatten(), change_of_bias]).norm().item()
    assert row["train/update_norm"] == pytest.approx(expected, rel=1e-4)


def test_a_step_with_a_nan_loss_is_skipped_with_a_warning_and_its_samples_listed(
    tmp_path: Path,
) -> None:
    class Skipping(Tiny):
        """Skips the third step by removing its gradients."""

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if self.trainer.global_step == 2:
                optimizer.zero_grad()

    module, other, logger = Tiny(broken_at=2), Skipping(), Logged()
    with pytest.warns(UserWarning, match="step 3 was skipped"):
        trainer(tmp_path, Health(tmp_path / "skipped"), logger=logger).fit(module, Batches())
    trainer(tmp_path).fit(other, Batches())
    assert torch.equal(module.weights(), other.weights())
    assert [row["train/skipped"] for row in logger.rows.values()] == [0, 0, 1, 1]
    listed = json.loads((tmp_path / "skipped" / "step_00000003_rank_0.json").read_text())
    assert listed == {"step": 3, "finite": [False], "batches": [{"id": [0, 1]}]}


def test_one_nan_batch_skips_the_entire_accumulated_step(tmp_path: Path) -> None:
    health = Health(tmp_path)
    with pytest.warns(UserWarning, match="step 2 was skipped"):
        trainer(tmp_path, health, accumulate_grad_batches=3, max_steps=2).fit(Tiny(broken_at=4), Batches())
    listed = json.loads((tmp_path / "step_00000002_rank_0.json").read_text())
    assert listed["finite"] == [True, False, True] and len(listed["batches"]) == 3


def test_a_nan_gradient_is_detected_even_if_the_loss_is_finite(tmp_path: Path) -> None:
    class Steep(Tiny):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return super().training_step(batch, index) + (self.backbone.weight * 0).sum().sqrt()

    module = Steep()
    with pytest.warns(UserWarning, match="step 1 was skipped"):
        trainer(tmp_path, Health(tmp_path), max_steps=2).fit(module, Batches())
    assert torch.equal(module.weights(), Tiny().weights())


def test_the_limit_of_skipped_steps_includes_those_before_a_resume(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 of at most 1"):
        trainer(tmp_path, Health(tmp_path, 2), Checkpoint(tmp_path)).fit(Tiny(broken_at=1), Batches())
    run = trainer(tmp_path, Health(tmp_path, 2), max_steps=6)
    with pytest.raises(FloatingPointError, match="of 2 steps was not finite, most recently of step 6"):
        run.fit(Tiny(broken_at=5), Batches(), ckpt_path=tmp_path / "last.ckpt")


def test_a_skipped_step_logs_no_norms(tmp_path: Path) -> None:
    logger = Logged()
    with pytest.warns(UserWarning, match="step 2 was skipped"):
        trainer(tmp_path, Health(tmp_path), logger=logger, max_steps=2).fit(Tiny(broken_at=1), Batches())
    assert {"train/grad_norm", "train/update_norm"} <= logger.rows[0].keys()
    assert not {"train/grad_norm", "train/update_norm"} & logger.rows[1].keys()


class Fused(Tiny):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.backbone.parameters(), lr=0.1, fused=True)


class Deferring(Health):
    """Reads no flag by itself, as on a GPU in steps that are not logged."""

    def _read(self, trainer: Any) -> bool:
        return False


def test_fused_adamw_itself_leaves_weights_and_state_of_a_broken_step_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match="step 3 was skipped"):
        (read := trainer(tmp_path, Health(tmp_path))).fit(first := Fused(broken_at=2), Batches())
    monkeypatch.setattr("ldm.callbacks.monitoring.health._is_slow_to_read", lambda flag: True)
    (unread := trainer(tmp_path, Deferring(tmp_path))).fit(second := Fused(broken_at=2), Batches())
    assert torch.equal(first.weights(), second.weights()) and first.weights().isfinite().all()
    pairs = zip(*(run.optimizers[0].state.values() for run in (read, unread)), strict=True)
    assert all(torch.equal(one[name], other[name]) for one, other in pairs for name in one)


def test_steps_that_were_not_read_are_reported_with_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Health):
        def on_before_optimizer_step(self, run: Any, *rest: Any) -> None:
            with monkeypatch.context() as patch:
                if run.global_step < 3:
                    patch.setattr(self, "_read", lambda _: False)
                super().on_before_optimizer_step(run, *rest)

    monkeypatch.setattr("ldm.callbacks.monitoring.health._is_slow_to_read", lambda flag: True)
    with pytest.warns(UserWarning, match="step 2 was skipped"):
        trainer(tmp_path, late := Late(tmp_path)).fit(Fused(broken_at=1), Batches())
    assert late.skipped == 1
    assert json.loads((tmp_path / "step_00000002_rank_0.json").read_text())["finite"] == [False]


def test_a_gpu_whose_utilisation_nvml_refuses_is_trained_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(device: torch.device) -> int:
        asked.append(device)
        raise RuntimeError("NVML: Not Supported")

    monkeypatch.setattr("ldm.callbacks.monitoring.health.NVML", True)
    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    monkeypatch.setattr(Tiny, "device", torch.device("cuda"))
    logger, run = Logged(), trainer(tmp_path, max_steps=2)
    health, module = Health(tmp_path), Tiny()
    run.strategy.connect(module)
    run.loggers = [logger]
    run.strategy.optimizers = [module.configure_optimizers()]
    health.on_train_batch_end(run, module, None, None, 0)
    (row,) = logger.rows.values()
    assert asked == [torch.device("cuda")] and "train/skipped" in row and "train/gpu_utilisation" not in row


def test_a_full_disk_does_not_end_the_training_at_a_skipped_step(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        fill(disk)
        run = trainer(tmp_path, Health(disk / "skipped"))
        with pytest.warns(UserWarning, match="samples of skipped step 2 was not saved because the disk is full"):
            run.fit(Tiny(broken_at=1), Batches())
    assert run.global_step == 4
