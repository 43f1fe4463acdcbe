"""Watches over the start of a distributed run, until all of its ranks have met."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from subprocess import Popen
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.callbacks.checkpointing.interruption import CONTINUE, SIGNALS, write_stderr
from ldm.errors import EXPECTED

LAUNCHER = "LDM_LAUNCHER"  # in the environment of ranks that rank 0 starts: its process
PAUSE = 0.2  # seconds between two looks
NOTICE = 60.0  # seconds after which waiting is reported, and then at twice as many each time
GRACE = 5.0  # seconds that the main thread has to handle a signal, or a failed rank's own message to arrive


class Meeting(Callback):
    """Ends a run whose ranks do not meet: another rank failed to start, died, or a signal arrived while waiting.

    Torch waits in C++, for up to 30 minutes, without a message and without calling Python's signal handlers.
    """

    def __init__(self) -> None:
        self.met = threading.Event()
        self._earlier = -1  # the file that signals were written to

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._end()  # Lightning's first barrier comes before this call

    def _end(self) -> None:
        if not self.met.is_set():
            self.met.set()
            signal.set_wakeup_fd(self._earlier)

    @contextmanager
    def watched(self, trainer: Trainer) -> Iterator[None]:
        """Watches in the context, which starts the ranks. Raises ConnectionError if torch gave up waiting for them."""
        environment: Any = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.world_size == 1 or environment is None:
            yield
            return
        host, ranks = environment.main_address, trainer.world_size
        _check_resolvable(host)
        where = f"all {ranks} ranks of this run to connect to {host}:{environment.main_port}, where rank 0 listens"
        if not trainer.local_rank:
            os.environ[LAUNCHER] = str(os.getpid())
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        os.set_blocking(reader, False)
        self._earlier = signal.set_wakeup_fd(writer)
        threading.Thread(target=self._watch, args=(trainer, reader, where), name="meeting", daemon=True).start()
        try:
            yield
        except SystemExit:
            if not self.met.is_set():  # they would wait for this process
                _kill(_children(trainer))
            raise
        except RuntimeError as error:
            if self.met.is_set() or isinstance(error, EXPECTED):
                raise
            text = " ".join(str(error).split())[:200]
            raise ConnectionError(f"waited in vain for {where} ({text}): {_advice(ranks)}") from error
        finally:
            self._end()
            os.close(writer)

    def _watch(self, trainer: Trainer, reader: int, where: str) -> None:
        launcher = os.environ.get(LAUNCHER) if trainer.local_rank else None
        began, notice = time.monotonic(), NOTICE
        while not self.met.wait(PAUSE):
            if number := _received(reader):
                if not self.met.wait(GRACE):
                    _end(_children(trainer), f"stopped by {number.name} before training; {CONTINUE}", 128 + number)
                return
            children = _take_over(trainer)
            for rank, child in enumerate(children, trainer.global_rank + 1):
                if child.poll() and not self.met.wait(GRACE):
                    name = f"rank {rank} of {trainer.world_size} (process {child.pid})"
                    _end(children, f"error: {name} {_how(child.returncode)} before training; {CONTINUE}", 1)
            if launcher and os.getppid() != int(launcher):
                _end([], f"error: rank 0 (process {launcher}) ended before training; {CONTINUE}", 1)
            if trainer.is_global_zero and time.monotonic() - began > notice:
                write_stderr(f"waiting for {notice:.0f} s for {where}: {_advice(trainer.world_size)}")
                notice *= 2
        os.close(reader)


def _check_resolvable(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ValueError(
            f"the ranks are to meet on host {host}, whose name this host cannot resolve ({error.strerror}): set the "
            "environment variable MASTER_ADDR to an address of the host of rank 0"
        ) from None


def _advice(ranks: int) -> str:
    return (
        f"start all {ranks} with the same command, check that none has failed, and that their hosts reach each other; "
        "MASTER_ADDR and MASTER_PORT set another address"
    )


def _received(reader: int) -> signal.Signals | None:
    with suppress(BlockingIOError, OSError):
        for number in os.read(reader, 64):
            if number in SIGNALS:
                return signal.Signals(number)
    return None


def _children(trainer: Trainer) -> list[Popen[Any]]:
    return [child for child in getattr(trainer.strategy.launcher, "procs", []) if isinstance(child, Popen)]


def _take_over(trainer: Trainer) -> list[Popen[Any]]:
    """Returns the ranks that this process started, and keeps Lightning from killing this process without a message."""
    children = _children(trainer)
    for thread in threading.enumerate():
        if children and thread.name == "child-process-observer" and hasattr(thread, "_run"):
            thread._run = lambda: True
    return children


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name} (a lack of memory ends in SIGKILL)"
    return f"ended with exit code {code}, for the reason that it printed above"


def _end(children: list[Popen[Any]], sentence: str, code: int) -> None:
    """Ends this process, whose main thread is blocked, and the ranks that it started."""
    _kill(children)
    write_stderr(sentence)
    os._exit(code)


def _kill(children: list[Popen[Any]]) -> None:
    for child in children:
        child.kill()
