"""The edge of every command: errors become one sentence and an exit code."""

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ldm.progress import clear

EXPECTED = (ValueError, OSError, FloatingPointError, MemoryError)  # whose message is written for people


class UsageError(ValueError):
    """The command line itself is wrong, rather than the work."""


def run(work: Callable[[], object], debug: bool = False) -> int:
    """The exit code of `work`: 0, 1 for a failure, 2 for a usage error, 130 for Ctrl-C."""
    try:
        work()
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # nothing is swallowed: it is told, and ends the process
        if debug:
            traceback.print_exc()
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def sentence(error: Exception) -> str:
    """What went wrong, on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Each different warning of ours once, as one line on stderr."""

    seen: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in seen:  # Python forgets what it has shown when a library changes the filters
            seen.add(str(message))
            clear()
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield
