"""What stands between a composed config and its objects: checks, run folders, sweeps, one-sentence errors."""

import hashlib
import json
import re
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ldm.commands.edge import EXPECTED
from ldm.files import is_locked, lock, write_text
from ldm.report.groups import decisive
from ldm.report.runs import WAITING, flatten
from ldm.training.consistency import disagreements
from ldm.training.trainer import check_trainer


def save_run(config: DictConfig, run_dir: Path) -> None:
    """The resolved config and the exact command, so that the run can be read and repeated."""
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    write_text(run_dir / "command.txt", shlex.join(["python", *sys.argv]) + "\n")


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


class Waiting(Callback):
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
        marks = [waiting(folder) for folder in folders if not folder.exists()]
        for folder in {mark.parent for mark in marks}:
            folder.parent.mkdir(parents=True, exist_ok=True)
            others = is_locked(folder.parent)
            lock(folder.parent, shared=True)  # until the process ends
            if not others:
                shutil.rmtree(folder, ignore_errors=True)  # of a sweep that was stopped
            folder.mkdir(exist_ok=True)
        for mark in marks:
            mark.touch()


def waiting(run_dir: Path) -> Path:
    """The mark of a run that has not begun."""
    return run_dir.parent / WAITING / run_dir.name


def hyperparameters(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides the result in an unresolved config, by dotted key; what only repeats another setting is left out."""
    return {key: value for key, value in decisive(flatten(settings)).items() if "${" not in str(value)}


def check_given(config: DictConfig) -> None:
    """Refuses a config in which a key that has no default was not given."""
    for key, value in flatten(OmegaConf.to_container(config)).items():
        if value == MISSING:
            raise ValueError(f"{key} has no default; give it as {key}=…")


def check_settings(config: DictConfig) -> None:
    """Refuses arguments of the Trainer that would be ignored, and settings that differ from those that they follow."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    check_trainer(plain["trainer"])
    if found := disagreements(plain):
        raise ValueError("; ".join(found))


def check_parallel(config: DictConfig, gpu: bool) -> None:
    """Refuses what the device, or strategy=fsdp, cannot do."""
    if "largest_batch" in config.callbacks and (config.trainer.accelerator == "cpu" or not gpu):
        raise ValueError(
            "debug=batch_size fills the memory of a GPU, and a process that fills the machine's is killed: use "
            "debug=plan, which computes what fits"
        )
    if str(config.trainer.precision).startswith("16") and (config.trainer.accelerator == "cpu" or not gpu):
        raise ValueError("precision=16-mixed needs a GPU; choose precision=bf16-mixed or precision=fp32")
    if config.precision.compute and "compute" not in config.training:
        raise ValueError("precision=bf16-true is for training=diffusion; choose precision=bf16-mixed")
    if isinstance(config.trainer.strategy, str) or "ModelParallel" not in config.trainer.strategy["_target_"]:
        return
    if "compute" not in config.training:
        raise ValueError("strategy=fsdp is for training=diffusion; choose strategy=ddp")
    if config.optimizer["_target_"].endswith("Muon"):
        raise ValueError("optimizer=muon needs whole matrices, and strategy=fsdp cuts them up; choose optimizer=adamw")
    if (config.get("evaluation") or {}).get("prompts"):
        raise ValueError(
            "with strategy=fsdp no process holds the weights that the evaluation at the end draws with; give "
            "metrics=none, and measure the run with ldm evaluate"
        )


def fast_precision(accelerator: str, plan: bool) -> str:
    """bf16-mixed where the GPU, or without one the CPU, has instructions for it, and in a plan; float32 elsewhere."""
    if plan:
        return "bf16-mixed"  # which every GPU that is planned for has
    from ldm.processor import choose_device, has_bf16

    return "bf16-mixed" if has_bf16(choose_device("cpu" if accelerator == "cpu" else "auto")) else "32-true"


OmegaConf.register_new_resolver("fast_precision", fast_precision, replace=True)


def is_refusal(error: BaseException) -> bool:
    """Whether the message is written for people, so that where it was raised says nothing more to them."""
    return isinstance(error, (*EXPECTED, HydraException, OmegaConfBaseException))


def sentence(error: BaseException) -> str:
    """What went wrong in one line: the innermost cause of what Hydra and OmegaConf wrap, with its key if need be."""
    key = re.search(r"full_key: (\S+)", str(error))
    while isinstance(error, HydraException | OmegaConfBaseException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_first_line(error)}"
    text = " ".join(str(error).split())
    if is_refusal(error) and text:
        return text
    return f"{key[1] + ': ' if key else ''}{type(error).__name__}: {text}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
