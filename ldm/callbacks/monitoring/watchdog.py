"""Ends a distributed run when a rank fails or stops making progress."""

import os
import threading
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ldm.callbacks.checkpointing.interruption import write_stderr

GRACE = 10.0  # seconds that a rank has to end with its own error after another rank failed


class Watchdog(Callback):
    """Ends this rank with exit code 1 and names the culprit if another rank failed or none progresses for `seconds`.

    Ranks exchange their progress through the store of the process group, in a thread, because the main thread is
    blocked while it waits in a collective operation. Covers training and validation.
    """

    def __init__(self, seconds: float = 1800.0) -> None:
        if seconds <= 0:
            raise ValueError(f"callbacks.watchdog.seconds is {seconds}, but must be positive")
        self.seconds = seconds
        self._batches = 0
        self._last_progress = time.monotonic()
        self._over = threading.Event()
        self._store: Any = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        store: Any = _get_default_store()
        self._store = PrefixStore(f"watchdog {trainer.global_step}", store.clone())
        self._over.clear()
        self._progressed()
        ranks = trainer.global_rank, trainer.world_size
        threading.Thread(target=self._watch, args=ranks, name="watchdog", daemon=True).start()

    def on_train_batch_start(self, *_: Any) -> None:
        self._progressed()

    def on_train_batch_end(self, *_: Any) -> None:
        self._progressed()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._progressed()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._over.set()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._over.set()
        if self._store is None or isinstance(exception, SystemExit):  # all ranks stop together
            return
        text = " ".join(str(exception).split())
        failure = f"rank {trainer.global_rank} of {trainer.world_size} failed: {type(exception).__name__}: {text}"
        first = self._store.compare_set("failed", "", failure).decode()
        write_stderr(failure if first == failure else f"{first} (rank {trainer.global_rank} stops because of this)")

    def _progressed(self) -> None:
        self._batches += 1
        self._last_progress = time.monotonic()

    def _watch(self, rank: int, ranks: int) -> None:
        pause = min(2.0, self.seconds / 4)
        while not self._over.wait(pause):
            failure, grace = None, 0.0
            try:
                self._store.set(str(rank), str(self._batches))
                if self._store.check(["failed"]):
                    failure, grace = self._store.get("failed").decode(), GRACE
                elif time.monotonic() - self._last_progress > self.seconds:
                    failure = self._stuck(rank, ranks)
            except RuntimeError:  # rank 0 hosts the store
                failure, grace = "rank 0 is gone", GRACE
            if failure is not None and not self._over.wait(grace):
                write_stderr(f"{failure} (rank {rank} stops because of this)")
                os._exit(1)  # nothing else ends the collective operation that blocks the main thread

    def _stuck(self, rank: int, ranks: int) -> str:
        """Returns a message that names the slowest rank."""
        self._over.wait(self.seconds / 2)  # by now, ranks that progressed after this one are blocked, too
        counts = {other: int(self._store.get(str(other))) for other in range(ranks) if self._store.check([str(other)])}
        slowest = min(counts, key=lambda other: counts[other])
        progress = ", ".join(f"rank {other}: {count}" for other, count in counts.items())
        return (
            f"no progress on rank {rank} for {self.seconds:g} s: rank {slowest} fell behind or ran out of data "
            f"(batches started and finished: {progress})"
        )
