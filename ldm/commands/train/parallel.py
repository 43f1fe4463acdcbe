"""Stops the parallel runs of a sweep together, after each has saved a checkpoint, and labels what they print.

The workers do not get the terminal's Ctrl-C. Each polls a file in which the sweep's process records the signals that it
receives, and stops as well if that process has died.
"""

import atexit
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from hydra.errors import CompactHydraException

from ldm import progress
from ldm.callbacks.checkpointing.interruption import SIGNALS, stop_cause, write_stderr
from ldm.files import temporary_folder

VARIABLE = "LDM_SWEEP"  # in the environment of workers: the sweep's process, a colon, and the file of its signals
POLL = 0.3  # seconds
CONTINUE = "run the same command to continue the sweep"


class Supervisor:
    """Records the signals that a sweep's process receives for its workers; a second one ends the process."""

    def __init__(self) -> None:
        self._folder = ExitStack()
        folder = self._folder.enter_context(temporary_folder(Path(tempfile.gettempdir(), "ldm")))
        self.file, self.process = folder / "signals", os.getpid()
        os.environ[VARIABLE] = f"{self.process}:{self.file}"
        atexit.register(self._remove)
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return
        earlier = signals(self.file)
        with self.file.open("a") as file:
            file.write(f"{number}\n")
        if earlier:
            raise SystemExit(128 + number)
        name = signal.Signals(number).name
        write_stderr(f"{name}: every run saves a checkpoint and stops; a second signal stops them immediately")

    def _remove(self) -> None:
        if os.getpid() == self.process:
            self._folder.close()


class Worker:
    """A process that a parallel sweep runs some of its jobs in, one after another."""

    current: "Worker | None" = None  # of this process

    def __init__(self, sweep: int, file: Path) -> None:
        self.sweep, self.file = sweep, file
        self.working = False
        if os.getpgrp() != os.getpid():
            os.setpgrp()  # a terminal sends its signals to the process group, and the sweep passes them on
        for number in SIGNALS:
            signal.signal(number, self._handle)
        threading.Thread(target=self._follow, name="sweep", daemon=True).start()

    def stop_requested(self) -> bool:
        return self._is_orphan() or bool(signals(self.file))

    def _is_orphan(self) -> bool:
        return os.getppid() != self.sweep

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Ends a job that does not train yet; while it trains, `Interruption` handles signals."""
        if self.working:
            raise SystemExit(128 + number)

    def _follow(self) -> None:
        seen = 0
        while True:
            time.sleep(POLL)
            received = signals(self.file)
            for number in received[seen:]:
                os.kill(os.getpid(), number)
            seen = len(received)
            if self._is_orphan():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    @contextmanager
    def job(self, label: str) -> Iterator[None]:
        """Runs a job of the sweep; one that is asked to stop fails for Hydra, which then waits for the other jobs."""
        if self.stop_requested():
            raise CompactHydraException(f"{label}: not started, because the sweep was stopped: {CONTINUE}")
        progress.run_label = f"{label} " if label else ""
        try:
            self.working = True
            yield
        except SystemExit as stop:
            if not isinstance(stop.code, int) or stop.code - 128 not in SIGNALS:
                raise
            raise CompactHydraException(f"{label}: stopped by {stop_cause(stop.code)}: {CONTINUE}") from None
        finally:
            self.working = False
            if self.stop_requested():
                os.killpg(0, signal.SIGTERM)  # ranks that were starting; this process is not working
            if self._is_orphan():
                sys.stderr.flush()
                os._exit(128 + signal.SIGTERM)


@contextmanager
def in_worker(label: str) -> Iterator[None]:
    """Runs a job of a sweep, which may stop and print with other ones if this process is a worker of the sweep."""
    process, _, file = os.environ.get(VARIABLE, "").partition(":")
    if Worker.current is None and process == str(os.getppid()):
        Worker.current = Worker(int(process), Path(file))
    if Worker.current is None:
        yield
        return
    with Worker.current.job(label):
        yield


@contextmanager
def exit_code_of_signals() -> Iterator[None]:
    """Makes a sweep that was stopped by a signal exit with 128 + its number, as a single run does."""
    try:
        yield
    except SystemExit:
        process, _, file = os.environ.get(VARIABLE, "").partition(":")
        if process == str(os.getpid()) and (received := signals(Path(file))):
            raise SystemExit(128 + received[0]) from None
        raise


def signals(file: Path) -> list[int]:
    """Returns the numbers of the signals that the sweep has received, in their order."""
    with suppress(OSError):
        return [int(line) for line in file.read_text().splitlines()]
    return []
