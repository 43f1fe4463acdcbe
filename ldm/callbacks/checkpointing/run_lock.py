"""A run's folder belongs to one process at a time, and others can see whether it lives."""

import os
import time
from pathlib import Path

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.files import try_lock
from ldm.ownership import check_outside, is_within, refuse

PATIENCE = 1.0  # seconds, as `ldm status` holds the lock for an instant while it looks
WRITTEN = ("config.yaml", "command.txt", "metrics.json", "checkpoints", "samples", "ema", "skipped", "*.safetensors")


class RunLock(Callback):
    """Holds the lock of `folder` while fitting. Raises ValueError where another process holds it.

    Raises FileExistsError at once where a run would write over files there: those of no run, of a run whose
    checkpoints are gone, or of another run than the one that the checkpoint `resume` belongs to. Raises ValueError for
    a folder within the training `data`.
    """

    def __init__(self, folder: str | Path, resume: str | None = None, data: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self._lock: int | None = None
        _check_replaceable(self.folder, resume)
        if data is not None:
            check_outside(self.folder, data, "run_dir", "training data")

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        while (held := try_lock(self.folder)) is None:
            if time.monotonic() - began > PATIENCE:
                raise ValueError(f"another process is training in {self.folder}: wait for it, or give another run_dir")
            time.sleep(PATIENCE / 20)
        self._lock = held

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _check_replaceable(folder: Path, resume: str | None) -> None:
    remedy = "give another run_dir"
    if not _is_run(folder):
        refuse(_in_the_way(folder), "a run", f"move it away, or {remedy}")
    checkpoints = [*folder.glob("checkpoints/*.ckpt")]
    weights = [*folder.glob("*.safetensors")]
    if weights and not checkpoints:
        raise FileExistsError(f"{weights[0]} is of a finished run, whose checkpoints are gone: {remedy}")
    if checkpoints and resume not in (None, "auto") and not is_within(Path(resume), folder):
        raise FileExistsError(
            f"{folder} holds a run of its own, but resume={resume} is a checkpoint of another one: {remedy}"
        )


def _is_run(folder: Path) -> bool:
    """Whether train.py wrote the config in the folder, which it does before all else."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and {"run_dir", "resume", "training"} <= config.keys()


def _in_the_way(folder: Path) -> list[Path]:
    """What there is where a run would write; an empty folder is nothing."""
    found = [path for pattern in WRITTEN for path in sorted(folder.glob(pattern))]
    return [path for path in found if not path.is_dir() or any(path.iterdir())]
