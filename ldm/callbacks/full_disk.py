"""Lets training continue with a warning when a file cannot be written because the disk is full."""

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def tolerate_full_disk(what: str, consequence: str = "training continues") -> Iterator[None]:
    """Abandons a write inside the context if the disk is full, and warns that `what` was not saved."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        warnings.warn(
            f"{what} was not saved because the disk is full: {consequence}; free some disk space before the next save",
            stacklevel=3,
        )


def is_disk_full(error: BaseException | None) -> bool:
    """Returns whether a full disk caused the error, also where torch.save has wrapped it in an error of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
