"""Trains a model from a config."""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ldm import progress
from ldm.commands.train.build import build, build_callbacks, build_training
from ldm.commands.train.checks import check, check_given, check_sampling_size
from ldm.commands.train.messages import as_usage_error
from ldm.commands.train.precision import uses_tf32
from ldm.commands.train.preparation import prepare
from ldm.commands.train.rehearsal import rehearse
from ldm.commands.train.resolvers import register_resolvers

if TYPE_CHECKING:  # importing it takes a second, which a refused command need not wait for
    from ldm.callbacks.monitoring.log_file import LogFile

register_resolvers()


def train(config: DictConfig) -> None:
    """Trains, or prints the plan with `plan`, or rehearses training with `rehearsal`."""
    if config.plan:
        from ldm.planning.report import print_plan

        with as_usage_error():
            check(config)
        return print_plan(dict(OmegaConf.to_container(config, resolve=True)))  # type: ignore[arg-type]
    if config.get("rehearsal"):
        rehearse(config, train_once)
    else:
        train_once(config)


def train_once(config: DictConfig) -> None:
    """Trains, with a log of all messages."""
    from ldm.callbacks.checkpointing.interruption import stopped_at_once
    from ldm.callbacks.monitoring.log_file import log_file

    with as_usage_error():
        check_given(config)
    with log_file(Path(config.run_dir)) as log, stopped_at_once():
        fit(config, log)


def fit(config: DictConfig, log: "LogFile") -> None:
    """Builds the objects of the config and trains."""
    prepared = prepare(config)
    from lightning import seed_everything

    from ldm.callbacks.monitoring.watchdog import reported_once
    from ldm.commands.train.own_callbacks import OwnCallbacks
    from ldm.device import allow_tf32, preferred_attention

    quiet_logging()
    allow_tf32(uses_tf32(config.precision))
    seed_everything(config.seed, verbose=False)
    with as_usage_error():
        own = OwnCallbacks(prepared, log)
        module, data, chosen = build_training(config.training), build(config.data.module), build_callbacks(config)
        check_sampling_size(config, module, data, chosen)
        trainer = build_trainer(config, own.around(chosen))
        trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    with reported_once(trainer), own.meeting.watched(trainer), preferred_attention(config.get("attention")):
        trainer.fit(module, data, ckpt_path=prepared.checkpoint, weights_only=True)
    if prepared.checkpoint and trainer.is_global_zero and trainer.global_step == own.start.step:
        print_that_it_is_trained(trainer, prepared.checkpoint)


def build_trainer(config: DictConfig, callbacks: list[Any]) -> Any:
    """Builds Lightning's Trainer, with the arguments that other settings determine."""
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar

    from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO
    from ldm.execution.srun import check_tasks, srun_environment

    environment = srun_environment()
    trainer = build(
        config.trainer,
        callbacks=callbacks,
        logger=[build(node) for node in config.logger],
        plugins=[AtomicCheckpointIO(), *([] if environment is None else [environment])],
        default_root_dir=str(config.run_dir),
        max_time=None,  # TimeLimit enforces it; with Lightning's own the run would count as finished
        use_distributed_sampler=False,  # the data module distributes samples over the ranks itself
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),  # else Lightning adds one
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
    )
    trainer._signal_connector.register_signal_handlers = _nothing  # it would swallow SIGTERM after training
    if note := check_tasks(trainer.num_devices, trainer.num_nodes):
        warnings.warn(note, stacklevel=2)
    return trainer


def _nothing() -> None:
    """Replaces Lightning's signal handlers: `Interruption` and `stopped_at_once` handle signals."""


def print_that_it_is_trained(trainer: Any, resumed: str) -> None:
    steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    done = f"{trainer.global_step} steps" if steps else f"{trainer.max_epochs} epochs"
    print(f"{resumed} has already trained for {done}: raise trainer.max_{'steps' if steps else 'epochs'} to continue")


def quiet_logging() -> None:
    """Silences Lightning's advice on intended settings, and prints each warning on one line."""
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated")  # within Lightning 2.6
    warnings.formatwarning = lambda message, *_, **__: f"{progress.run_label}warning: {message}\n"
