"""Collects the warnings and log messages of all ranks of a run in one file."""

import fcntl
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from torch.utils.data import get_worker_info

FILE = "log.txt"
LOG = logging.getLogger("ldm")  # its messages are written to the file only
KEPT = 10_000  # messages that are kept while they cannot be written


class LogFile(logging.Handler):
    """Appends each message to `path` with its time, rank and level, once `open` is called.

    Earlier messages, and those that cannot be written, are kept in memory: a run that is refused leaves no file, and a
    full disk neither fails a run nor loses messages if it is freed later.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self.path = path
        self._rank: int | None = None
        self._messages: list[tuple[str, str, str]] = []  # time, level and text
        self._written = 0, 0  # start and end of the last part of the file that only this process wrote
        self._process = os.getpid()

    def open(self, rank: int) -> None:
        self._rank = rank
        self.flush()

    def withdraw(self) -> None:
        """Closes the file and removes what this process wrote at its end, and the file if nothing else is in it."""
        self._rank = None
        start, end = self._written
        with suppress(OSError):
            if start < end == self.path.stat().st_size:
                os.truncate(self.path, start) if start else self.path.unlink()

    def emit(self, record: logging.LogRecord) -> None:
        if os.getpid() != self._process:  # a data loader's worker, which has a copy of its parent's messages
            self._process, self._messages = os.getpid(), []
        now = datetime.now().astimezone().isoformat(" ", timespec="seconds")
        self._messages.append((now, record.levelname, self.format(record)))
        del self._messages[:-KEPT]
        self.flush()

    def flush(self) -> None:
        """Writes the messages under a lock, because several processes and machines may append to the file."""
        if self._rank is None or not self._messages:
            return
        worker = get_worker_info()
        source = f"rank {self._rank}" + ("" if worker is None else f" worker {worker.id}")
        lines = "".join(f"{now} {source} {level} {text}\n" for now, level, text in self._messages).encode()
        with suppress(OSError), self.path.open("a+b", buffering=0) as file:
            with suppress(OSError):  # without locks, lines of two machines may be mixed up
                fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":  # the end of a killed process
                lines = b"\n" + lines
            if _append(file, lines):
                self._messages = []
                start = self._written[0] if self._written[1] == end else end
                self._written = start, end + len(lines)
            else:
                file.truncate(end)


def _append(file: Any, lines: bytes) -> bool:
    try:
        return bool(file.write(lines) == len(lines))
    except OSError:
        return False


@contextmanager
def log_file(folder: Path) -> Iterator[LogFile]:
    """Yields a LogFile that receives, in the block, all warnings, the messages of LOG and those of libraries.

    Warnings are still shown, and so are messages of libraries.
    """
    log, show = LogFile(folder / FILE), warnings.showwarning
    log.setFormatter(logging.Formatter("%(message)s"))

    def show_and_log(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        place = Path(filename)
        text = f"{category.__name__}: {message} ({place.parent.name}/{place.name}:{lineno})"
        log.handle(logging.LogRecord("py.warnings", logging.WARNING, filename, lineno, text, None, None))
        show(message, category, filename, lineno, file, line)

    root = logging.getLogger()
    alone = not root.handlers and logging.lastResort is not None
    if alone:  # with another handler, Python would not print warnings of libraries any more
        root.addHandler(logging.lastResort)  # type: ignore[arg-type]
    level, propagate = LOG.level, LOG.propagate
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    loggers = [root, *(logging.getLogger(name) for name in ("ldm", "lightning.pytorch", "lightning.fabric"))]
    for logger in loggers:
        logger.addHandler(log)
    warnings.showwarning = show_and_log
    try:
        yield log
    finally:
        warnings.showwarning = show
        for logger in loggers:
            logger.removeHandler(log)
        if alone:
            root.removeHandler(logging.lastResort)  # type: ignore[arg-type]
        LOG.setLevel(level)
        LOG.propagate = propagate
