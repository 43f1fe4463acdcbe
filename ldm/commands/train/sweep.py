"""Names the run folders of a sweep, marks waiting runs, and cleans up the process between runs."""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from ldm.commands.train.checks import check_given
from ldm.commands.train.config_sources import source_arguments
from ldm.commands.train.parallel import Supervisor
from ldm.files import is_locked, lock
from ldm.report.groups import decisive
from ldm.report.runs import WAITING, flatten


def sweep_label(hydra: Any) -> str:
    """Returns a human-readable label of a job: the overrides that the sweep varies."""
    return str(hydra.job.override_dirname) or "run"


def sweep_folder(config: DictConfig, parent: Path, label: str) -> Path:
    """Returns the folder of a sweep's run, identified by a hash of the settings that affect its result.

    The human-readable `label` is that of the run that created the folder. A checkpoint of another run that this run
    starts from is part of the hash.
    """
    settings = decisive(flatten(OmegaConf.to_container(config, resolve=True)), config.run_dir)
    if config.resume not in (None, "auto"):
        settings["resume"] = config.resume
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    readable = re.sub(r"[^\w=.,+-]+", "-", label)[:80]
    return next(iter(parent.glob(f"*_{digest}")), parent / f"{readable}_{digest}")


class WaitingMarks(Callback):
    """Marks each run of a sweep that has no folder yet as waiting when the sweep starts, and supervises parallel runs.

    The marks are valid while the sweep's process lives, which locks the folder of its runs. The run folders' names
    contain the settings that the sweep varies, and no other ones.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        launcher = config.hydra.launcher
        if launcher._target_.endswith(".JoblibLauncher") and launcher.n_jobs != 1:  # one job runs in this process
            Supervisor()
        listed = [f"{key}={values}" for key, values in (config.hydra.sweeper.get("params") or {}).items()]
        overrides = OverridesParser.create().parse_overrides([*listed, *config.hydra.overrides.task])
        constant = json.dumps([override.key_or_group for override in overrides if not override.is_sweep_override()])
        with open_dict(config):
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys={constant}")
        if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            return  # other sweepers choose their runs as they proceed
        folders = []
        for overridden in BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]:
            job = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overridden))
            HydraConfig.instance().set_config(job)  # resolves the job's ${hydra:…}
            parent, label = Path(job.hydra.sweep.dir), sweep_label(job.hydra)
            with open_dict(job):
                del job["hydra"]
            with suppress(ValueError):  # a missing key is reported when the run starts
                check_given(job)
                folders.append(sweep_folder(job, parent, label))
        marks = [waiting_mark(folder) for folder in folders if not folder.exists()]
        for folder in {mark.parent for mark in marks}:
            folder.parent.mkdir(parents=True, exist_ok=True)
            others = is_locked(folder.parent)
            lock(folder.parent, shared=True)  # until the process ends
            if not others:
                shutil.rmtree(folder, ignore_errors=True)  # left by a sweep that was stopped
            folder.mkdir(exist_ok=True)
        for mark in marks:
            mark.write_text(platform.node())


def waiting_mark(run_dir: Path) -> Path:
    """Returns the path of the file that marks a run as waiting."""
    return run_dir.parent / WAITING / run_dir.name


def set_sweep_folder(config: DictConfig, script: Path) -> Path:
    """Sets and returns the folder of a sweep's run, where it resumes if it was stopped."""
    hydra_config = HydraConfig.get()
    check_given(config)
    run_dir = sweep_folder(config, Path(hydra_config.sweep.dir), sweep_label(hydra_config))
    OmegaConf.update(config, "run_dir", str(run_dir))
    if config.resume is None or [*run_dir.glob("checkpoints/*.ckpt")]:  # own checkpoints precede another run's
        OmegaConf.update(config, "resume", "auto")
    # This is the run's own command, whichever process the launcher uses; Lightning starts the other ranks with it.
    own = f"run_dir='{run_dir}'", f"resume='{config.resume}'"
    sources = source_arguments(hydra_config, script.parent / "conf")
    sys.argv = [os.path.relpath(script), *hydra_config.overrides.task, *own, *sources]
    sys.modules["__main__"].__spec__ = None  # in a launcher's worker, Lightning would start ranks as that worker
    return run_dir


def reset_ranks(environment: dict[str, str]) -> None:
    """Removes the environment and process group of a distributed run, which the sweep's next run would inherit."""
    if os.environ == environment:
        return
    from torch import distributed

    os.environ.clear()
    os.environ.update(environment)
    if distributed.is_initialized():
        distributed.destroy_process_group()
