"""A run's folder belongs to one process at a time, and others can see whether it lives."""

import os
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.files import is_locked, lock

PATIENCE = 1.0  # seconds, as `ldm status` holds the lock for an instant while it looks


class Running(Callback):
    """Holds the lock of `folder` while fitting. Raises ValueError where another process holds it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock: int | None = None

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        while is_locked(self.folder):
            if time.monotonic() - began > PATIENCE:
                raise ValueError(f"another process is training in {self.folder}: wait for it, or give another run_dir")
            time.sleep(PATIENCE / 20)
        self._lock = lock(self.folder)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
