"""Stops a run gracefully on Ctrl-C, SIGTERM, SIGUSR1 or at its time limit; a second signal stops it immediately."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ldm import progress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
CONTINUE = "run the same command with resume=auto"
TIMEOUT = 124  # as timeout(1) exits when the time is over


class Interruption:
    """Records the first signal between `watch` and `restore`; if `graceful` is False, a signal ends the process.

    Once the run has `failed`, signals are ignored: launchers send them to the other ranks, which end by themselves.
    """

    failed = False
    watched = False  # whether training has started in this process

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.graceful = True
        self._deadline = math.inf
        self._process = os.getpid()
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def code(self) -> int:
        """The exit code to stop with after this step, or 0 to continue."""
        if self.signal:
            return 128 + self.signal
        return TIMEOUT if self.graceful and time.monotonic() > self._deadline else 0

    def watch(self, seconds: float = math.inf) -> None:
        """Starts handling signals, and sets the time limit to `seconds` from now."""
        self.signal, self.graceful, self._process = None, True, os.getpid()
        Interruption.failed, Interruption.watched = False, True
        self._deadline = time.monotonic() + seconds
        self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def restore(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader's worker, which must keep working until the run ends
            return
        if Interruption.failed:
            return
        name = signal.Signals(number).name
        if self.signal or not self.graceful:
            write_stderr(f"{progress.run_label}{name}: stopped immediately")
            raise SystemExit(128 + number)
        self.signal = signal.Signals(number)
        plan = "saving a checkpoint and stopping after this step; a second signal stops immediately"
        write_stderr(f"{progress.run_label}{name}: {plan}")


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Makes signals raise SystemExit in the context where no `Interruption` watches: in set-up and in the final work.

    Callbacks can then record why the run ended. The signals of a worker of a sweep arrive here, too.
    """
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process or Interruption.failed:
            return
        when = "after the last step, before the run was finished" if Interruption.watched else "before training"
        write_stderr(f"{progress.run_label}{signal.Signals(number).name}: stopped {when}; {CONTINUE}")
        raise SystemExit(128 + number)

    Interruption.failed = Interruption.watched = False
    earlier = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def stop_cause(code: int) -> str:
    """Returns the name of the signal or setting that an exit code of `Interruption` stands for."""
    return "trainer.max_time" if code == TIMEOUT else signal.Signals(code - 128).name


def write_stderr(text: str) -> None:
    """Writes a line to stderr; safe in signal handlers, where print is not."""
    os.write(2, f"\n{text}\n".encode())
