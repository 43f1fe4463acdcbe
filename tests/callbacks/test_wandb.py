"""Runs logger=wandb offline."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from ldm.callbacks.monitoring.hyperparameters import Hyperparameters
from ldm.callbacks.monitoring.scalar_table import ScalarTable
from tests.callbacks.tiny import Batches, Tiny, trainer

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
