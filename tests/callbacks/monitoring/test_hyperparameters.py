import json
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ldm.callbacks.monitoring.hyperparameters import Hyperparameters
from ldm.callbacks.monitoring.metrics import Metrics
from ldm.callbacks.monitoring.scalar_table import ScalarTable
from tests.callbacks.tiny import Batches, Tiny, trainer
from tests.training.tiny import diffusion, fit

SETTINGS = {"seed": 3, "schedule": "cosine", "data.limit": None}


class Kept(Logger):
    """A logger that only keeps the settings."""

    name = version = ""

    def log_metrics(self, *_: Any, **__: Any) -> None: ...

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.settings = params


def test_the_tensorboard_hparams_tab_has_the_settings_and_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"metrics": {"fid": 2.5, "accuracy": 0.5}, "provenance": {}}))
    logger = TensorBoardLogger(tmp_path, "tensorboard", "", default_hp_metric=False)
    trainer(tmp_path, Hyperparameters(SETTINGS, tmp_path), logger=[logger]).fit(Tiny(), Batches())
    log = EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    assert [(e.step, e.value) for e in log.Scalars("fid")] == [(3, 2.5)]  # counted from step 0, like all scalars
    plugin_data = HParamsPluginData.FromString(log.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    values = plugin_data.session_start_info.hparams
    assert values["seed"].number_value == 3 and values["schedule"].string_value == "cosine"
    names = HParamsPluginData.FromString(log.PluginTagToContent("hparams")["_hparams_/experiment"]).experiment
    assert {info.name.tag for info in names.metric_infos} == {"fid", "accuracy"}


def test_a_validation_before_the_end_is_logged_at_its_step_with_a_column(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "tensorboard", "", default_hp_metric=False)
    callbacks = [Metrics(tmp_path), Hyperparameters(SETTINGS, tmp_path)]
    how = {"logger": [logger], "val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(tmp_path, diffusion(), 3, callbacks=callbacks, **how)
    log = EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    assert [event.step for event in log.Scalars("val/pictures/loss")] == [1]
    names = HParamsPluginData.FromString(log.PluginTagToContent("hparams")["_hparams_/experiment"]).experiment
    assert [info.name.tag for info in names.metric_infos] == ["val/pictures/loss"]


def test_other_loggers_get_the_settings_even_in_a_run_without_metrics(
    tmp_path: Path,
) -> None:
    kept, table = Kept(), ScalarTable(tmp_path)
    trainer(tmp_path, Hyperparameters(SETTINGS, tmp_path), logger=[kept, table]).fit(Tiny(), Batches())
    assert kept.settings == SETTINGS
