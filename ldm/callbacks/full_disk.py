"""A full disk costs what was to be written, and no more."""

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def tolerate_full_disk(what: str, consequence: str = "training goes on") -> Iterator[None]:
    """Within it a write that finds the disk full is given up, with a warning that names it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        warnings.warn(
            f"{what} WAS NOT SAVED, because the disk is full: {consequence}; free some space before the next save",
            stacklevel=3,
        )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind the error: torch.save hides it behind its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
