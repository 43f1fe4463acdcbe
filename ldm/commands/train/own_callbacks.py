"""Builds the callbacks that every run has, around those that its config chooses."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Callback, Trainer

from ldm.callbacks.checkpointing.effective_settings import EffectiveSettings
from ldm.callbacks.checkpointing.run_start import RunStart
from ldm.callbacks.checkpointing.settings_check import SettingsCheck
from ldm.callbacks.checkpointing.time_limit import TimeLimit
from ldm.callbacks.monitoring.early_log import EarlyLog
from ldm.callbacks.monitoring.hyperparameters import Hyperparameters
from ldm.callbacks.monitoring.log_file import LOG, LogFile
from ldm.callbacks.monitoring.meeting import Meeting
from ldm.callbacks.monitoring.outcome import Outcome
from ldm.callbacks.monitoring.run_log import RunLog
from ldm.callbacks.monitoring.scalar_table import ScalarTable
from ldm.callbacks.monitoring.tensorboard import TensorBoard
from ldm.callbacks.monitoring.utilisation import Utilisation
from ldm.callbacks.monitoring.workers import Workers
from ldm.commands.train.preparation import Prepared
from ldm.commands.train.run_folder import hyperparameters, save_run
from ldm.data.sources.small import note_of
from ldm.planning.settings import kind_of_product
from ldm.planning.training_flops import flops_per_image, peak_flops


class OwnCallbacks:
    """The callbacks that every run has. `meeting` watches it until its ranks have met; `start` knows its first step."""

    def __init__(self, prepared: Prepared, log: LogFile) -> None:
        self.prepared, self.log = prepared, log
        self.meeting, self.start = Meeting(), RunStart(self._start)
        duration = prepared.config.trainer.get("max_time")
        self.limit = [] if duration is None else [TimeLimit(duration)]

    def around(self, chosen: Sequence[Callback]) -> list[Callback]:
        """Returns all callbacks in the order in which Lightning is to call them."""
        config, settings, resolved = self.prepared.config, self.prepared.settings, self.prepared.resolved
        flops = training_flops(resolved) if config.logger else None
        return [
            Workers(),
            self.meeting,
            EffectiveSettings(),
            self.start,
            SettingsCheck(settings, resolved, config.accept_changes),
            *self.limit,
            RunLog(self.log),
            *chosen,
            Utilisation(flops, partial(peak_flops, kind=kind_of_product(resolved))),
            Hyperparameters(hyperparameters(settings), self.prepared.run_dir),  # reads the metrics that others write
            Outcome(self.prepared.run_dir),
            EarlyLog(self.log),
        ]

    def _start(self, trainer: Trainer) -> None:
        """Records the run in its folder, and prints where it is and which data its validation uses."""
        run_dir, checkpoint, data = self.prepared.run_dir, self.prepared.checkpoint, trainer.datamodule  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if isinstance(logger, ScalarTable | TensorBoard):
                logger.resume(trainer.global_step)
        save_run(self.prepared.config, run_dir, trainer.global_step)
        print(f"run folder: {run_dir}" + (f", resuming from {checkpoint}" if checkpoint else ""), flush=True)
        for name, dataset in data.val.items():
            if (note := note_of(dataset)) is not None:
                print(f"val/{name}: {note}", flush=True)


def training_flops(config: dict[str, Any]) -> float | None:
    """Returns the FLOPs of training on an image; None, with a message in the log, if they cannot be computed."""
    try:
        return flops_per_image(config)
    except Exception as error:  # networks and data sets of other packages may have settings that a plan does not know
        LOG.warning(f"FLOP/s are not logged, because the FLOPs of a step cannot be computed ({error})")
        return None
