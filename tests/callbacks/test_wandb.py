"""Runs logger=wandb offline."""

import warnings
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from ldm.callbacks.monitoring.hyperparameters import Hyperparameters
from ldm.callbacks.monitoring.scalar_table import ScalarTable
from tests.callbacks.tiny import Batches, Tiny, trainer
from tests.runs import TINY
from tests.small_disk import fill, small_disk
from tests.train.processes import finish, start

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.slow
def test_wandb_logs_a_run_offline_into_its_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        nodes = compose("train", overrides=["logger=wandb", "name=test", f"run_dir={tmp_path}"]).logger
    loggers = [instantiate(node) for node in nodes]
    trainer(tmp_path, Hyperparameters({"seed": 3}, tmp_path), logger=loggers).fit(Tiny(), Batches())
    assert loggers[0].experiment.offline and isinstance(loggers[1], ScalarTable)
    loggers[0].experiment.finish()
    (run,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert run.stat().st_size > 0


@pytest.mark.slow
def test_a_full_disk_costs_only_the_log_of_wandb_and_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    from ldm.callbacks.monitoring.wandb import Wandb

    class Logging(Tiny):
        def on_train_batch_end(self, *_: object) -> None:
            self.logger.log_metrics({f"value {k}": 1.0 for k in range(1000)}, self.global_step)  # type: ignore[union-attr]
            if self.global_step == 2:
                fill(disk)

    monkeypatch.setenv("WANDB_SILENT", "true")
    with small_disk(tmp_path / "disk", pages=256) as disk, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logger = Wandb(project="ldm", save_dir=str(disk), offline=True)
        run = trainer(tmp_path, logger=logger)
        run.fit(Logging(), Batches())
        logger.experiment.finish()
    assert run.global_step == 4
    assert sum("because the disk is full: training continues" in str(warning.message) for warning in caught) == 1
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.full_size
def test_a_run_whose_disk_fills_fails_at_its_last_checkpoint_with_wandb_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with small_disk(tmp_path / "disk", pages=64) as disk:
        plain = "metrics=none", "callbacks.previews=null", "trainer.max_steps=2"
        run = finish(start(*TINY, *plain, "logger=wandb", f"run_dir={disk}/run"))
    assert run.returncode == 1
    assert "the last checkpoint, of step 2, was not saved because the disk is full" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
