"""Ctrl-C, SIGTERM and SIGUSR1 ask a run to stop; a second one stops it at once."""

import os
import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Notes the first signal after `watch`, until `restore`; any once `patient` is False ends the process."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.patient = True
        self._process = os.getpid()
        self._handlers: dict[signal.Signals, Any] = {}

    def watch(self) -> None:
        self.signal, self.patient, self._process = None, True, os.getpid()
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
        if self.signal or not self.patient:
            say(f"{name}: stopped at once")
            raise SystemExit(128 + number)
        self.signal = signal.Signals(number)
        say(f"{name}: saving a checkpoint after this step; a second signal stops at once")


def say(text: str) -> None:
    """A line on stderr, also within a handler, where print must not be called."""
    os.write(2, f"\n{text}\n".encode())
