"""Locks a run's folder while it trains, and refuses to write over files of others."""

import os
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.files import sweep, try_lock
from ldm.ownership import check_outside, is_within, refuse

PATIENCE = 1.0  # seconds to wait for the lock, which `ldm status` holds for an instant while it looks
WRITTEN = (
    *("config.yaml", "command.txt", "metrics.json", "metrics.csv", "log.txt", "state.json"),
    *("checkpoints", "samples", "ema", "skipped", "*.safetensors"),
)


class RunLock(Callback):
    """Locks `folder` during fit, so that `ldm status` sees a live run. Raises ValueError if another process holds it.

    The constructor raises FileExistsError if the run would overwrite files that no run wrote, files of a run whose
    checkpoints are gone, or files of another run than that of the checkpoint `resume`, and ValueError if `folder` is
    inside the training `data`.
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
        started = time.monotonic()
        while (lock := try_lock(self.folder)) is None:
            if time.monotonic() - started > PATIENCE:
                raise ValueError(
                    f"another process is training in {self.folder}: wait until it ends, or give another run_dir"
                )
            time.sleep(PATIENCE / 20)
        self._lock = lock

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Removes what killed processes left; every check that may refuse the run has passed."""
        if trainer.is_global_zero:
            for folder in (self.folder, *filter(Path.is_dir, self.folder.iterdir())):
                sweep(folder)

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
        refuse(_blocking_files(folder), "a run", f"move it away, or {remedy}")
    checkpoints = [*folder.glob("checkpoints/*.ckpt")]
    weights = [*folder.glob("*.safetensors")]
    if weights and not checkpoints:
        raise FileExistsError(f"{weights[0]} belongs to a finished run whose checkpoints are gone: {remedy}")
    if checkpoints and resume not in (None, "auto") and not is_within(Path(resume), folder):
        raise FileExistsError(
            f"{folder} already contains a run, but resume={resume} is a checkpoint of another run: {remedy}"
        )


def _is_run(folder: Path) -> bool:
    """Returns whether train.py wrote the folder's config.yaml or, before training starts, state.json."""
    return any(
        {*keys} <= _read(folder / name).keys()
        for name, keys in (
            ("config.yaml", ("run_dir", "resume", "training")),
            ("state.json", ("state", "step", "host", "process")),
        )
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _blocking_files(folder: Path) -> list[Path]:
    """Returns existing files and non-empty folders at the paths that a run writes."""
    existing = [path for pattern in WRITTEN for path in sorted(folder.glob(pattern))]
    return [path for path in existing if not path.is_dir() or any(path.iterdir())]
