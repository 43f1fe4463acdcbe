"""Ctrl-C, SIGTERM, SIGUSR1 and the end of its time ask a run to stop; a second signal stops it at once."""

import math
import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TIMEOUT = 124  # the exit code of timeout(1) where the time is over


class Interruption:
    """Notes the first signal after `watch`, until `restore`; any once `graceful` is False ends the process."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.graceful = True
        self._deadline = math.inf
        self._process = os.getpid()
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def code(self) -> int:
        """The exit code to stop with after this step; 0 where nothing asks for it, as after the last step."""
        if self.signal:
            return 128 + self.signal
        return TIMEOUT if self.graceful and time.monotonic() > self._deadline else 0

    def watch(self, seconds: float = math.inf) -> None:
        """From now on, and for so many seconds."""
        self.signal, self.graceful, self._process = None, True, os.getpid()
        self._deadline = time.monotonic() + seconds
        self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def restore(self) -> None:
        """The handlers from before are back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, which works on until the run ends
            return
        name = signal.Signals(number).name
        if self.signal or not self.graceful:
            write_stderr(f"{name}: stopped at once")
            raise SystemExit(128 + number)
        self.signal = signal.Signals(number)
        write_stderr(f"{name}: saving a checkpoint after this step; a second signal stops at once")


def stop_cause(code: int) -> str:
    """What asked for an exit code of `Interruption`."""
    return "trainer.max_time" if code == TIMEOUT else signal.Signals(code - 128).name


def write_stderr(text: str) -> None:
    """A line on stderr, also within a handler, where print must not be called."""
    os.write(2, f"\n{text}\n".encode())
