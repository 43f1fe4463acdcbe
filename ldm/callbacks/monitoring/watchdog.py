"""Ends a distributed run when a rank fails, dies or stops making progress, and reports which one in one sentence."""

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from subprocess import Popen
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ldm.callbacks.checkpointing.interruption import Interruption, write_stderr
from ldm.callbacks.find import find
from ldm.callbacks.monitoring.ranks import Failure, Ranks, is_consequence, own_failure
from ldm.errors import EXPECTED, ReportedFailure

GRACE = 10.0  # seconds that a rank has to end with its own error after another rank failed
PAUSE = 1.0  # seconds between two looks at the other ranks
FITS = count()  # of this process, as of every other rank
SILENCE = 10.0  # seconds without a beat after which, if communication failed, a rank on another machine is dead


class Watchdog(Callback):
    """Ends this rank with exit code 1 if another rank failed, died, or none progresses for `seconds`.

    One rank of each host prints one sentence: which rank failed, where, why, and what to do. Ranks exchange their
    state through the store of the process group, in a thread, because the main thread is blocked while it waits in a
    collective operation. A second thread ends this rank if the store does not answer for `seconds`, as when the link to
    its host stalls, because reading from it can block for much longer. Covers everything from the moment at which
    the ranks have met to the end of the run, and a lack of progress in training and validation.
    """

    def __init__(self, seconds: float = 1800.0) -> None:
        if seconds <= 0:
            raise ValueError(f"callbacks.watchdog.seconds is {seconds}, but must be positive")
        self.seconds = seconds
        self.failure: Failure | None = None  # of the run
        self._batches = 0
        self._last_progress = self._last_look = time.monotonic()
        self._training = False
        self._over = threading.Event()
        self._ranks: Ranks | None = None

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        store: Any = _get_default_store()
        store = PrefixStore(f"watchdog {next(FITS)}", store.clone())
        self._ranks = Ranks(store, trainer.global_rank, trainer.world_size, _take_over_children(trainer))
        self.failure = None
        self._over.clear()
        self._last_progress = self._last_look = time.monotonic()
        for work in (self._watch, self._watch_store):
            threading.Thread(target=work, args=(self._ranks,), name="watchdog", daemon=True).start()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._training = True
        self._progressed()

    def on_train_batch_start(self, *_: Any) -> None:
        self._progressed()

    def on_train_batch_end(self, *_: Any) -> None:
        self._progressed()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._progressed()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._training = False

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._over.set()
        if self._ranks is not None:
            with suppress(RuntimeError):  # rank 0, which hosts the store, may have ended already
                self._ranks.leave()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._over.set()
        ranks = self._ranks
        if ranks is None or not isinstance(exception, Exception):  # signals stop all ranks together
            return
        Interruption.failed = True
        failure = self._explained(ranks, exception)
        own, logged = failure.rank == ranks.own.rank, logging.getLogger("ldm").handlers
        if own and not logged and not isinstance(exception, EXPECTED):
            traceback.print_exception(exception)
        self._report(ranks, failure)

    def _explained(self, ranks: Ranks, exception: Exception) -> Failure:
        """Returns the failure that caused the exception, of another rank if communication failed."""
        if self.failure is not None:  # the other thread has read it, and the store may have ended since
            return self.failure
        end = time.monotonic() + (SILENCE + 2 * PAUSE if is_consequence(exception) else 0.0)
        try:
            while (failure := ranks.failure(SILENCE)) is None and time.monotonic() < end:
                time.sleep(0.1)
            return failure or ranks.publish(own_failure(ranks.own, exception))
        except RuntimeError:
            return ranks.unreachable() if is_consequence(exception) else own_failure(ranks.own, exception)

    def _report(self, ranks: Ranks, failure: Failure) -> None:
        """Prints the failure on one rank of each host, once all ranks know it."""
        self.failure = failure
        with suppress(RuntimeError):  # the store may have ended with rank 0
            ranks.acknowledge(GRACE)
            if failure.rank != ranks.own.rank:  # whose message is the last one, if this process started that one
                ranks.wait_for(failure.rank, GRACE)
        self._print(ranks, failure)

    def _print(self, ranks: Ranks, failure: Failure) -> None:
        if ranks.reports(failure):
            sys.stderr.flush()
            write_stderr(f"error: {failure.sentence}")
        if failure.rank == ranks.own.rank or not failure.reports:
            _write_for_torchrun(failure.sentence)

    def _progressed(self) -> None:
        self._batches += 1
        self._last_progress = time.monotonic()

    def _watch(self, ranks: Ranks) -> None:
        while not self._over.wait(min(PAUSE, self.seconds / 4)):
            self._last_look = time.monotonic()
            try:
                ranks.beat(self._batches)
                failure = ranks.failure(self.seconds)
                if failure is None and self._training and time.monotonic() - self._last_progress > self.seconds:
                    failure = self._stuck(ranks)
            except RuntimeError:
                if not self._training:  # rank 0, which hosts the store, has finished
                    return
                failure = ranks.unreachable()
            if failure is None:
                continue
            Interruption.failed, self.failure = True, failure
            with suppress(RuntimeError):
                ranks.store.set(f"knows {ranks.own.rank}", "")
            if not self._over.wait(GRACE):
                self._report(ranks, failure)
                os._exit(1)  # nothing else ends the collective operation that blocks the main thread

    def _watch_store(self, ranks: Ranks) -> None:
        while not self._over.wait(min(PAUSE, self.seconds / 4)):
            look = self._last_look
            if time.monotonic() - look < self.seconds or self._over.wait(GRACE):
                continue
            if self._training and self.failure is None and self._last_look == look:  # or this process was suspended
                Interruption.failed, self.failure = True, ranks.unreachable()
                self._print(ranks, self.failure)
                os._exit(1)

    def _stuck(self, ranks: Ranks) -> Failure:
        """Returns a failure that names the slowest rank."""
        self._over.wait(self.seconds / 2)  # by now, ranks that progressed after this one are blocked, too
        if (failure := ranks.failure(self.seconds)) is not None:  # no answer explains more than no progress
            return failure
        counts = ranks.batches()
        slowest = min(counts, key=lambda other: counts[other])
        progress = ", ".join(f"rank {other}: {count}" for other, count in counts.items())
        return ranks.publish(
            Failure(
                f"no progress on rank {ranks.own.rank} for {self.seconds:g} s: {ranks.members[slowest]} fell behind or "
                f"ran out of data (batches started and finished: {progress}); look at that host and its storage, and "
                "run the same command with resume=auto",
                -1,
            )
        )


@contextmanager
def reported_once(trainer: Trainer) -> Iterator[None]:
    """Raises ReportedFailure in place of an error that the Watchdog has explained to the user."""
    try:
        yield
    except Exception as error:
        watchdog = find(trainer, Watchdog)
        if watchdog is None or watchdog.failure is None:
            raise
        raise ReportedFailure(watchdog.failure.sentence) from error


def _take_over_children(trainer: Trainer) -> Any:
    """Returns a function that reports how a child rank ended, and stops Lightning's thread that observes the children.

    That thread would kill this process, without a message, within five seconds after a child has failed.
    """
    children = [child for child in getattr(trainer.strategy.launcher, "procs", []) if isinstance(child, Popen)]
    for thread in threading.enumerate():
        if children and thread.name == "child-process-observer" and hasattr(thread, "_run"):
            thread._run = lambda: True
    first = trainer.global_rank + 1
    return lambda rank: children[rank - first].poll() if first <= rank < first + len(children) else None


def _write_for_torchrun(sentence: str) -> None:
    """Adds the sentence to the report that torchrun prints at the end."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError), open(path, "w") as file:
            json.dump({"message": {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}}, file)
