"""Formats errors, including those of Hydra and OmegaConf, as one sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ldm import errors
from ldm.errors import EXPECTED, UsageError, worker_failure


def is_refusal(error: BaseException) -> bool:
    """Returns whether the error's message explains it to the user, so that no traceback is needed."""
    expected = isinstance(error, (*EXPECTED, HydraException, OmegaConfBaseException))
    return expected or worker_failure(error) is not None


def sentence(error: BaseException) -> str:
    """Returns the error message on one line: that of the innermost cause, with its config key where it helps."""
    if (failure := worker_failure(error)) is not None:
        return failure
    key = re.search(r"full_key: (\S+)", str(error))
    error = _innermost(error)
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {first_line(error)}"
    if isinstance(error, OSError):
        return errors.sentence(error)
    text = " ".join(str(error).split())
    if is_refusal(error) and text:
        return text
    return f"{key[1] + ': ' if key else ''}{type(error).__name__}: {text}"


def exit_code(error: BaseException) -> int:
    """Returns 2 for an invalid setting, which a check or the constructor of an object refuses, and 1 for a failure."""
    in_config = isinstance(error, HydraException | OmegaConfBaseException)
    refused = isinstance(_innermost(error), ValueError | TypeError | HydraException | OmegaConfBaseException)
    return 2 if isinstance(error, UsageError) or (in_config and refused) else 1


def _innermost(error: BaseException) -> BaseException:
    """Returns the cause that Hydra and OmegaConf wrap in their own exceptions."""
    while isinstance(error, HydraException | OmegaConfBaseException) and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def as_usage_error() -> Iterator[None]:
    """Turns an invalid setting, which a check in the block finds, into a UsageError with the same message."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
