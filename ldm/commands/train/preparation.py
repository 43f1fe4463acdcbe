"""Completes and checks the config of a run, and finds the checkpoint that it resumes from."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from ldm.commands.train.checks import check, check_parallel
from ldm.commands.train.messages import as_usage_error
from ldm.commands.train.run_folder import checkpoint_to_resume, keep_earlier_settings


@dataclass(frozen=True)
class Prepared:
    """A complete config without interpolations, as an object and as plain data (`resolved`).

    `settings` is plain data with the interpolations, so that each setting occurs once. `checkpoint` is the one that the
    run resumes from.
    """

    config: DictConfig
    settings: dict[str, Any]
    resolved: dict[str, Any]
    checkpoint: str | None

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)


def prepare(config: DictConfig) -> Prepared:
    """Completes the config in place, resolves and checks it. Raises UsageError for contradictory settings."""
    if config.data.get("bucketed"):
        avoid_fragmentation()
    import torch

    fill_in_settings(config)
    take_own_gpu(config.trainer)
    checkpoint = checkpoint_to_resume(config.resume, Path(config.run_dir))
    if checkpoint:
        keep_earlier_settings(config, checkpoint)
    settings: Any = OmegaConf.to_container(config)
    OmegaConf.resolve(config)
    resolved: Any = OmegaConf.to_container(config)
    with as_usage_error():
        check(config)
        check_parallel(config, torch.cuda.is_available())
    return Prepared(config, settings, resolved, checkpoint)


def take_own_gpu(trainer: DictConfig) -> None:
    """Makes a rank's own GPU the current one if torchrun or srun started it; `trainer.devices` may list them.

    The Trainer does so only after images are encoded, or sampled for data=subject; until then all ranks would use one.
    """
    from ldm.device import device_of_rank, ranks

    _, world, local = ranks()
    if world > 1 and trainer.accelerator != "cpu":
        listed = trainer.devices if isinstance(trainer.devices, ListConfig) else None
        device_of_rank("auto", listed[local] if listed and local < len(listed) else local)


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
