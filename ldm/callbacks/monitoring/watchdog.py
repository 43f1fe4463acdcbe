"""No rank waits for ever for another one."""

import os
import threading
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ldm.callbacks.checkpointing.interruption import write_stderr

GRACE = 10.0  # seconds in which a rank may end by itself, with an error of its own, after another one failed


class Watchdog(Callback):
    """Ends this rank with exit code 1, naming the culprit, when another has failed or none moves for `seconds`.

    Ranks tell each other through the store that they met by, from a thread of their own, because a rank
    that waits within a collective operation can do nothing else. It watches over training and validation.
    """

    def __init__(self, seconds: float = 1800.0) -> None:
        if seconds <= 0:
            raise ValueError(f"callbacks.watchdog.seconds is {seconds}, but must be positive")
        self.seconds = seconds
        self._batches = 0
        self._moved = time.monotonic()
        self._over = threading.Event()
        self._store: Any = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        store: Any = _get_default_store()
        self._store = PrefixStore(f"watchdog {trainer.global_step}", store.clone())
        self._over.clear()
        self._move()
        place = trainer.global_rank, trainer.world_size
        threading.Thread(target=self._watch, args=place, name="watchdog", daemon=True).start()

    def on_train_batch_start(self, *_: Any) -> None:
        self._move()

    def on_train_batch_end(self, *_: Any) -> None:
        self._move()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._move()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._over.set()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._over.set()
        if self._store is None or isinstance(exception, SystemExit):  # which all ranks agreed on
            return
        text = " ".join(str(exception).split())
        told = f"rank {trainer.global_rank} of {trainer.world_size} failed: {type(exception).__name__}: {text}"
        first = self._store.compare_set("failed", "", told).decode()
        write_stderr(told if first == told else f"{first} (and so rank {trainer.global_rank} had to stop)")

    def _move(self) -> None:
        self._batches += 1
        self._moved = time.monotonic()

    def _watch(self, rank: int, ranks: int) -> None:
        pause = min(2.0, self.seconds / 4)
        while not self._over.wait(pause):
            told, patience = None, 0.0
            try:
                self._store.set(str(rank), str(self._batches))
                if self._store.check(["failed"]):
                    told, patience = self._store.get("failed").decode(), GRACE
                elif time.monotonic() - self._moved > self.seconds:
                    told = self._stuck(rank, ranks)
            except RuntimeError:  # the store lives in rank 0
                told, patience = "rank 0 is gone", GRACE
            if told is not None and not self._over.wait(patience):
                write_stderr(f"{told} (and so rank {rank} had to stop)")
                os._exit(1)  # the main thread waits within an operation that nothing else can end

    def _stuck(self, rank: int, ranks: int) -> str:
        self._over.wait(self.seconds / 2)  # those that still moved when this one stopped stand still by now
        at = {other: int(self._store.get(str(other))) for other in range(ranks) if self._store.check([str(other)])}
        first = min(at, key=lambda other: at[other])
        where = ", ".join(f"rank {other}: {count}" for other, count in at.items())
        return (
            f"no progress on rank {rank} for {self.seconds:g} s: rank {first} fell behind, or ran out of data (batches "
            f"begun and ended: {where})"
        )
