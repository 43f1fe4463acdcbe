"""What a run records in its folder, and the checkpoint that it resumes from."""

import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.files import write_text
from ldm.report.groups import decisive
from ldm.report.runs import flatten


def save_run(config: DictConfig, run_dir: Path) -> None:
    """The resolved config and the exact command, so that the run can be read and repeated."""
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    write_text(run_dir / "command.txt", shlex.join(["python", *sys.argv]) + "\n")


def hyperparameters(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides the result in an unresolved config, by dotted key; what only repeats another setting is left out."""
    return {key: value for key, value in decisive(flatten(settings)).items() if "${" not in str(value)}


def checkpoint_to_resume(resume: str | None, run_dir: Path) -> str | None:
    """The file to go on from: the run's own for auto, if there is one."""
    from ldm.callbacks.checkpointing.checkpoint_file import newest

    if resume is None and list(run_dir.glob("checkpoints/*.ckpt")):
        raise ValueError(f"{run_dir} holds a run already; go on with resume=auto, or give another run_dir")
    if resume in (None, "auto"):
        return str(found) if (found := newest(run_dir / "checkpoints")) else None
    if not Path(str(resume)).is_file():
        raise FileNotFoundError(f"resume={resume}: there is no such checkpoint; give a .ckpt file, or resume=auto")
    return resume
