"""Turns errors and warnings of a command into single lines on stderr, and errors into an exit code."""

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ldm.progress import clear

EXPECTED = (ValueError, OSError, FloatingPointError, MemoryError)  # their messages are human-readable


class UsageError(ValueError):
    """The command line is invalid, as opposed to a failure of the work that it asks for."""


def run(work: Callable[[], object], debug: bool = False) -> int:
    """Runs `work` and returns the exit code: 0, 1 for a failure, 2 for a usage error, 130 for Ctrl-C."""
    try:
        work()
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # not swallowed: it is printed and decides the exit code
        if debug:
            traceback.print_exc()
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def sentence(error: Exception) -> str:
    """Returns the message of `error` on one line, with its type if the message alone is not meant for the user."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


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
