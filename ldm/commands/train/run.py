"""Trains a model from a config."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from ldm import progress
from ldm.commands.train.build import build, build_callbacks, build_training
from ldm.commands.train.checks import check, check_given, check_parallel, check_sampling_size
from ldm.commands.train.precision import uses_tf32  # the module also registers a resolver that configs use
from ldm.commands.train.run_folder import checkpoint_to_resume, hyperparameters, keep_earlier_settings, save_run


def train(config: DictConfig) -> None:
    """Builds the objects of the config and trains, or prints the plan with `plan`."""
    if config.data.get("bucketed"):
        avoid_fragmentation()
    import torch
    from lightning import seed_everything
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar

    from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO
    from ldm.callbacks.checkpointing.effective_settings import EffectiveSettings
    from ldm.callbacks.checkpointing.run_start import RunStart
    from ldm.callbacks.checkpointing.settings_check import SettingsCheck
    from ldm.callbacks.checkpointing.time_limit import TimeLimit
    from ldm.callbacks.monitoring.hyperparameters import Hyperparameters
    from ldm.callbacks.monitoring.watchdog import reported_once
    from ldm.data.sources.small import note_of
    from ldm.device import allow_tf32
    from ldm.training.diffusion import DiffusionTraining

    run_dir = Path(config.run_dir)
    if config.plan:
        from ldm.planning.report import print_plan

        check(config)
        return print_plan(dict(OmegaConf.to_container(config, resolve=True)))  # type: ignore[arg-type]
    check_given(config)
    fill_in_settings(config)
    resumed = checkpoint_to_resume(config.resume, run_dir)
    if resumed:
        keep_earlier_settings(config, resumed)
    settings: Any = OmegaConf.to_container(config)  # unresolved, so that each setting occurs once
    OmegaConf.resolve(config)
    resolved: Any = OmegaConf.to_container(config)
    check(config)
    check_parallel(config, torch.cuda.is_available())
    quiet_logging()
    allow_tf32(uses_tf32(config.precision))
    seed_everything(config.seed, verbose=False)

    limit = [TimeLimit(config.trainer.max_time)] if config.trainer.get("max_time") is not None else []
    module = build_training(config.training)
    data = build(config.data.module)

    def start() -> None:
        save_run(config, run_dir)
        print(f"run folder: {run_dir}" + (f", resuming from {resumed}" if resumed else ""), flush=True)
        for name, dataset in data.val.items():
            if (note := note_of(dataset)) is not None:
                print(f"val/{name}: {note}", flush=True)

    run_start = RunStart(start)
    chosen = build_callbacks(config)
    if isinstance(module, DiffusionTraining):
        check_sampling_size(config, module, data, chosen)
    logged = Hyperparameters(hyperparameters(settings), run_dir)  # last, because it reads the metrics that others write
    trainer = build(
        config.trainer,
        callbacks=[
            EffectiveSettings(),
            run_start,
            SettingsCheck(settings, resolved, config.accept_changes),
            *limit,
            *chosen,
            logged,
        ],
        logger=[build(node) for node in config.logger],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run_dir),
        max_time=None,  # TimeLimit enforces it; with Lightning's own the run would count as finished
        use_distributed_sampler=False,  # the data module distributes samples over the ranks itself
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in chosen),  # else Lightning adds one
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in chosen),
    )
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    with reported_once(trainer):
        trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    if resumed and trainer.global_step == run_start.step:
        steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        done = f"{trainer.global_step} steps" if steps else f"{trainer.max_epochs} epochs"
        print(
            f"{resumed} has already trained for {done}: raise trainer.max_{'steps' if steps else 'epochs'} to continue"
        )


def avoid_fragmentation() -> None:
    """Lets blocks of GPU memory grow, which images of several sizes would fragment, unless the user has set otherwise.

    Has an effect only before torch allocates memory on a GPU.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


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
