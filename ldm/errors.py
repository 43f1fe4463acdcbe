"""Turns errors and warnings of a command into single lines on stderr, and errors into an exit code."""

import atexit
import io
import os
import re
import stat
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from ldm.progress import clear

EXPECTED = (ValueError, OSError, FloatingPointError, MemoryError)  # their messages are human-readable
ENDED_WORKER = re.compile(r"DataLoader worker \(pid(\(s\))? (?P<process>[\d, ]+)\) (is killed|exited unexpectedly)")

CLOSED_PIPE = 141  # the shell's exit code of a process that SIGPIPE ended


class UsageError(ValueError):
    """The command line is invalid, as opposed to a failure of the work that it asks for."""


class ReportedFailure(Exception):
    """Training failed, and the user has been told why."""


def run(work: Callable[[], object], debug: bool = False) -> int:
    """Runs `work` and returns the exit code: 0, 1 for a failure, 2 for a usage error, 130 for Ctrl-C."""
    try:
        work()
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # not swallowed: it is printed and determines the exit code
        if debug:
            traceback.print_exc()
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def sentence(error: Exception) -> str:
    """Returns the message of `error` on one line, with its type if the message alone is not meant for the user."""
    if (failure := worker_failure(error)) is not None:
        return failure
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def shortened(value: object, most: int = 60) -> str:
    """Returns the repr of a value, of at most `most` characters, for a message that quotes it."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def worker_failure(error: BaseException) -> str | None:
    """Returns what a data loader's worker raised, or how it ended, if that caused the error; else None."""
    cause: BaseException | None = error
    while cause is not None:
        if ended := ENDED_WORKER.search(str(cause)):
            return (
                f"a worker of the data loader (process {ended['process']}) died or was killed, as when memory runs out "
                "(dmesg may say so): use fewer workers, and run the same command again"
            )
        if str(cause).startswith("Caught ") and " in DataLoader worker" in str(cause):
            return str(cause).rstrip().splitlines()[-1].removeprefix("ValueError: ")
        cause = cause.__cause__
    return None


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Prints each distinct UserWarning raised in the block once, as one line on stderr."""

    seen: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in seen:  # Python's own record is reset whenever a library changes the filters
            seen.add(str(message))
            clear()
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


class _Pipe(io.FileIO):
    """Ends the program quietly when its reader, such as `head`, has closed the pipe."""

    lost = False  # whether any pipe was closed

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            _Pipe.lost = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # discards the data that is still buffered
            raise SystemExit(CLOSED_PIPE) from None


def end_quietly_on_closed_pipes() -> None:
    """Makes the program exit with 141 when the reader of its output is gone, like most programs in a pipeline.

    Restoring the default action of SIGPIPE instead would also kill a run whose connection to a logger breaks.
    """
    sys.stdout, sys.stderr = (_piped(stream) for stream in (sys.stdout, sys.stderr))
    atexit.register(_flush)


def _piped(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper) or not stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _flush() -> None:
    """Flushes stdout at exit, because Python itself would report a closed pipe with a traceback."""
    with suppress(SystemExit):
        sys.stdout.flush()
    if _Pipe.lost:  # an exit handler, such as this one, cannot change the exit code otherwise
        os._exit(CLOSED_PIPE)
