"""Records a run in its folder, and finds the checkpoint that it resumes from."""

import platform
import shlex
import sys
from datetime import datetime
from math import inf
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.files import write_text
from ldm.report.groups import decisive
from ldm.report.runs import flatten


def save_run(config: DictConfig, run_dir: Path, step: int = 0) -> None:
    """Writes the resolved config, and adds the exact command, with its date, to the run's earlier commands."""
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    file = run_dir / "command.txt"
    earlier = file.read_text() if file.is_file() else ""
    now = datetime.now().astimezone().isoformat(" ", timespec="seconds")
    about = f"# {now} on {platform.node()}" + (f", resumed after step {step}" if step else "")
    write_text(file, f"{earlier}{about}\n{shlex.join(['python', *sys.argv])}\n")


def hyperparameters(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of an unresolved config that affect the result, by dotted key, without interpolations."""
    return {key: value for key, value in decisive(flatten(settings)).items() if "${" not in str(value)}


def checkpoint_to_resume(resume: str | None, run_dir: Path) -> str | None:
    """Returns the checkpoint to resume from: for auto the run's newest one, or None if it has none.

    Raises ValueError if the run's folder has a checkpoint of a later step, which resume=auto would prefer afterwards.
    """
    from ldm.callbacks.checkpointing.checkpoint_file import newest, step_of, written_by_run

    if resume is None and list(run_dir.glob("checkpoints/*.ckpt")):
        raise ValueError(f"{run_dir} already contains a run: resume it with resume=auto, or give another run_dir")
    if resume in (None, "auto"):
        return str(found) if (found := newest(run_dir / "checkpoints")) else None
    if not Path(str(resume)).is_file():
        raise FileNotFoundError(f"resume={resume} does not exist: give a .ckpt file, or resume=auto")
    step = step_of(Path(str(resume)))
    for file in written_by_run(run_dir / "checkpoints"):
        if step < step_of(file) < inf:
            raise ValueError(
                f"{run_dir} contains {file.name} of step {step_of(file)}, later than step {step} of resume={resume}: "
                "give another run_dir, or resume=auto to continue that run"
            )
    return resume


def keep_earlier_settings(config: DictConfig, checkpoint: str) -> None:
    """Restores the behaviour of the ldm version that started a run, where the current version differs."""
    from ldm.callbacks.checkpointing.checkpoint_file import read_settings
    from ldm.callbacks.checkpointing.settings_check import BEFORE

    recorded = flatten(read_settings(checkpoint))
    for key, value in BEFORE.items():
        if recorded.get(key, value) == value and OmegaConf.select(config, key) is not None:
            OmegaConf.update(config, key, value)
