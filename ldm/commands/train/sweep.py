"""The runs of a sweep: their folders, the marks of those that wait, and what one run leaves for the next."""

import hashlib
import json
import os
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
from ldm.files import is_locked, lock
from ldm.report.groups import decisive
from ldm.report.runs import WAITING, flatten


def sweep_label(hydra: Any) -> str:
    """A job's overrides, for people: first those that its sweep varies, as far as that is known."""
    constant = set(hydra.job.config.override_dirname.exclude_keys)
    parsed = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    rest = sorted(str(one.input_line) for one in parsed if one.key_or_group in constant)
    return ",".join([*filter(None, [hydra.job.override_dirname]), *rest])


def sweep_folder(config: DictConfig, parent: Path, label: str) -> Path:
    """A sweep's run by its content: a hash of what decides its result; `label`, for people, is of the first so made.

    A checkpoint that the run starts from, unlike its own, is part of that.
    """
    settings = decisive(flatten(OmegaConf.to_container(config, resolve=True)), config.run_dir)
    if config.resume not in (None, "auto"):
        settings["resume"] = config.resume
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    readable = re.sub(r"[^\w=.,+-]+", "-", label)[:80]
    return next(iter(parent.glob(f"*_{digest}")), parent / f"{readable}_{digest}")


class WaitingMarks(Callback):
    """Marks each run of a sweep as waiting when the sweep starts; one that has a folder waits no more.

    Their names begin with what the sweep varies.

    The marks hold while the sweep's process does, which locks the folder of its runs.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            return  # which finds its runs as it goes
        folders = []
        listed = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
        overrides = OverridesParser.create().parse_overrides([*listed, *config.hydra.overrides.task])
        constant = json.dumps([one.key_or_group for one in overrides if not one.is_sweep_override()])
        with open_dict(config):
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys={constant}")
        for overridden in BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]:
            job = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overridden))
            HydraConfig.instance().set_config(job)  # which the job's ${hydra:…} refer to
            parent, label = Path(job.hydra.sweep.dir), sweep_label(job.hydra)
            with open_dict(job):
                del job["hydra"]
            with suppress(ValueError):  # for a key that was not given: the run itself says so
                check_given(job)
                folders.append(sweep_folder(job, parent, label))
        marks = [waiting_mark(folder) for folder in folders if not folder.exists()]
        for folder in {mark.parent for mark in marks}:
            folder.parent.mkdir(parents=True, exist_ok=True)
            others = is_locked(folder.parent)
            lock(folder.parent, shared=True)  # until the process ends
            if not others:
                shutil.rmtree(folder, ignore_errors=True)  # of a sweep that was stopped
            folder.mkdir(exist_ok=True)
        for mark in marks:
            mark.touch()


def waiting_mark(run_dir: Path) -> Path:
    """The mark of a run that has not begun."""
    return run_dir.parent / WAITING / run_dir.name


def set_sweep_folder(config: DictConfig, script: Path) -> Path:
    """Gives the run of a sweep its folder, named by what decides its result, in which it goes on."""
    hydra_config = HydraConfig.get()
    check_given(config)
    run_dir = sweep_folder(config, Path(hydra_config.sweep.dir), sweep_label(hydra_config))
    OmegaConf.update(config, "run_dir", str(run_dir))
    if config.resume is None or [*run_dir.glob("checkpoints/*.ckpt")]:  # another run's checkpoint only begins this one
        OmegaConf.update(config, "resume", "auto")
    # the run's own command, whichever process its launcher runs it in, and what its other ranks are started by
    own = f"run_dir='{run_dir}'", f"resume='{config.resume}'"
    sys.argv = [os.path.relpath(script), *hydra_config.overrides.task, *own]
    sys.modules["__main__"].__spec__ = None  # that of a launcher's worker, which Lightning would start the ranks by
    return run_dir


def reset_ranks(environment: dict[str, str]) -> None:
    """Takes back what a run on several ranks leaves in this process, and the next run of a sweep would take for its."""
    if os.environ == environment:
        return
    from torch import distributed

    os.environ.clear()
    os.environ.update(environment)
    if distributed.is_initialized():
        distributed.destroy_process_group()
