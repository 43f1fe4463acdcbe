import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from torch import Tensor

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


def hparams_tab(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """Returns settings and metrics by run, as TensorBoard's own code collects them for its HParams tab."""
    runs = EventMultiplexer()
    runs.AddRunsFromDirectory(str(folder))
    runs.Reload()
    provider = MultiplexerDataProvider(runs, str(folder))
    tab, call = Context(TBContext(data_provider=provider, logdir=str(folder))), RequestContext()
    experiment = tab.experiment_from_metadata(call, "", True, tab.hparams_metadata(call, ""), [])
    states = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    request = api_pb2.ListSessionGroupsRequest(slice_size=9, allowed_statuses=states, include_metrics=True)
    for info in experiment.hparam_infos:
        request.col_params.add().hparam = info.name
    groups = Handler(call, tab, "", request).run().session_groups
    return {
        group.name: (
            {name: value.number_value or value.string_value for name, value in group.hparams.items()},
            {metric.name.tag: metric.value for metric in group.metric_values},
        )
        for group in groups
    }


def board(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(folder, "tensorboard", "", default_hp_metric=False)


def test_the_tensorboard_hparams_tab_has_the_settings_and_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"metrics": {"fid": 2.5, "accuracy": 0.5}, "provenance": {}}))
    trainer(tmp_path, Hyperparameters(SETTINGS, tmp_path), logger=[board(tmp_path)]).fit(Tiny(), Batches())
    log = EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    assert [(e.step, e.value) for e in log.Scalars("fid")] == [(3, 2.5)]  # counted from step 0, like all scalars
    settings, metrics = hparams_tab(tmp_path)["tensorboard"]
    assert settings["seed"] == 3 and settings["schedule"] == "cosine"
    assert {"fid": 2.5, "accuracy": 0.5}.items() <= metrics.items()


def test_the_hparams_tab_shows_a_run_that_was_not_measured_or_has_not_ended(tmp_path: Path) -> None:
    class Fails(Tiny):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            self.log("train/loss", torch.tensor(0.5))
            if index == 2:
                raise ValueError("the run ends here")
            return super().training_step(batch, index)

    for name, module in (("failed", Fails()), ("ended", Tiny())):
        folder = tmp_path / name
        with suppress(ValueError):
            trainer(folder, Hyperparameters(SETTINGS, folder), logger=[board(folder)]).fit(module, Batches())
    tab = hparams_tab(tmp_path)
    assert {run: settings["schedule"] for run, (settings, _) in tab.items()} == {
        "failed/tensorboard": "cosine",
        "ended/tensorboard": "cosine",
    }
    assert tab["failed/tensorboard"][1]["train/loss"] == 0.5


def test_a_validation_before_the_end_is_logged_at_its_step_only(tmp_path: Path) -> None:
    callbacks = [Metrics(tmp_path), Hyperparameters(SETTINGS, tmp_path)]
    how = {"logger": [board(tmp_path)], "val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(tmp_path, diffusion(), 3, callbacks=callbacks, **how)
    log = EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    assert [event.step for event in log.Scalars("val/pictures/loss")] == [1]
    assert "val/pictures/loss" in hparams_tab(tmp_path)["tensorboard"][1]


def test_other_loggers_get_the_settings_even_in_a_run_without_metrics(
    tmp_path: Path,
) -> None:
    kept, table = Kept(), ScalarTable(tmp_path)
    trainer(tmp_path, Hyperparameters(SETTINGS, tmp_path), logger=[kept, table]).fit(Tiny(), Batches())
    assert kept.settings == SETTINGS
