"""Trains a model from a config."""

import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from ldm import progress
from ldm.commands.train.build import build, build_callbacks, build_training
from ldm.commands.train.checks import check, check_given, check_parallel, check_sampling_size
from ldm.commands.train.messages import as_usage_error
from ldm.commands.train.precision import uses_tf32
from ldm.commands.train.rehearsal import rehearse
from ldm.commands.train.resolvers import register_resolvers
from ldm.commands.train.run_folder import checkpoint_to_resume, hyperparameters, keep_earlier_settings, save_run

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
    if config.data.get("bucketed"):
        avoid_fragmentation()
    import torch
    from lightning import seed_everything

    from ldm.callbacks.checkpointing.effective_settings import EffectiveSettings
    from ldm.callbacks.checkpointing.run_start import RunStart
    from ldm.callbacks.checkpointing.settings_check import SettingsCheck
    from ldm.callbacks.checkpointing.time_limit import TimeLimit
    from ldm.callbacks.monitoring.early_log import EarlyLog
    from ldm.callbacks.monitoring.hyperparameters import Hyperparameters
    from ldm.callbacks.monitoring.meeting import Meeting
    from ldm.callbacks.monitoring.outcome import Outcome
    from ldm.callbacks.monitoring.run_log import RunLog
    from ldm.callbacks.monitoring.scalar_table import ScalarTable
    from ldm.callbacks.monitoring.tensorboard import TensorBoard
    from ldm.callbacks.monitoring.utilisation import Utilisation
    from ldm.callbacks.monitoring.watchdog import reported_once
    from ldm.callbacks.monitoring.workers import Workers
    from ldm.data.sources.small import note_of
    from ldm.device import allow_tf32, preferred_attention
    from ldm.planning.settings import kind_of_product
    from ldm.planning.training_flops import peak_flops
    from ldm.training.diffusion import DiffusionTraining

    run_dir = Path(config.run_dir)
    fill_in_settings(config)
    take_own_gpu(config.trainer.accelerator)
    resumed = checkpoint_to_resume(config.resume, run_dir)
    if resumed:
        keep_earlier_settings(config, resumed)
    settings: Any = OmegaConf.to_container(config)  # unresolved, so that each setting occurs once
    OmegaConf.resolve(config)
    resolved: Any = OmegaConf.to_container(config)
    with as_usage_error():
        check(config)
        check_parallel(config, torch.cuda.is_available())
    quiet_logging()
    allow_tf32(uses_tf32(config.precision))
    seed_everything(config.seed, verbose=False)

    limit = [TimeLimit(config.trainer.max_time)] if config.trainer.get("max_time") is not None else []
    module = build_training(config.training)
    data = build(config.data.module)

    def start() -> None:
        for logger in trainer.loggers:
            if isinstance(logger, ScalarTable | TensorBoard):
                logger.resume(trainer.global_step)
        save_run(config, run_dir, trainer.global_step)
        print(f"run folder: {run_dir}" + (f", resuming from {resumed}" if resumed else ""), flush=True)
        for name, dataset in data.val.items():
            if (note := note_of(dataset)) is not None:
                print(f"val/{name}: {note}", flush=True)

    flops = training_flops(resolved) if config.logger else None
    run_start = RunStart(start)
    chosen = build_callbacks(config)
    if isinstance(module, DiffusionTraining):
        check_sampling_size(config, module, data, chosen)
    logged = Hyperparameters(hyperparameters(settings), run_dir)  # last, because it reads the metrics that others write
    meeting = Meeting()
    callbacks = [
        Workers(),
        meeting,
        EffectiveSettings(),
        run_start,
        SettingsCheck(settings, resolved, config.accept_changes),
        *limit,
        RunLog(log),
        *chosen,
        Utilisation(flops, partial(peak_flops, kind=kind_of_product(resolved))),
        logged,
        Outcome(run_dir),
        EarlyLog(log),
    ]
    trainer = build_trainer(config, callbacks)
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    with reported_once(trainer), meeting.watched(trainer), preferred_attention(config.get("attention")):
        trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    if resumed and trainer.is_global_zero and trainer.global_step == run_start.step:
        print_that_it_is_trained(trainer, resumed)


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


def take_own_gpu(accelerator: str) -> None:
    """Makes a rank's own GPU the current one if torchrun or srun started it.

    The Trainer does so later than images are encoded, or sampled for data=subject, and all ranks would use one GPU.
    """
    from ldm.device import device_of_rank, ranks

    _, world, local = ranks()
    if world > 1 and accelerator != "cpu":
        device_of_rank("auto", local)


def avoid_fragmentation() -> None:
    """Lets blocks of GPU memory grow, which images of several sizes would fragment, unless the user has set otherwise.

    Has an effect only before torch allocates memory on a GPU.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def training_flops(config: dict[str, Any]) -> float | None:
    """Returns the FLOPs of training on an image; None, with a message in the log, if they cannot be computed."""
    from ldm.callbacks.monitoring.log_file import LOG
    from ldm.planning.training_flops import flops_per_image

    try:
        return flops_per_image(config)
    except Exception as error:  # networks and data sets of other packages may have settings that a plan does not know
        LOG.warning(f"FLOP/s are not logged, because the FLOPs of a step cannot be computed ({error})")
        return None


def fill_in_settings(config: DictConfig) -> None:
    """Fills in what a config leaves open: the device and precision of this machine, and the sampler's options."""
    import torch

    from ldm.device import NO_MPS
    from ldm.sampling.driver import SAMPLERS
    from ldm.sampling.options import options_of

    config.precision.name = config.precision.name
    if config.trainer.accelerator == "auto" and torch.backends.mps.is_available():  # which Lightning would choose
        print(f"note: trainer.accelerator=auto is taken as cpu, because {NO_MPS}", file=sys.stderr)
        config.trainer.accelerator = "cpu"
    if config.sampler.name in SAMPLERS:
        with open_dict(config):
            config.sampler.options = options_of(SAMPLERS[config.sampler.name]) | dict(config.sampler.options)


def quiet_logging() -> None:
    """Silences Lightning's advice on intended settings, and prints each warning on one line."""
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated")  # within Lightning 2.6
    warnings.formatwarning = lambda message, *_, **__: f"{progress.run_label}warning: {message}\n"
