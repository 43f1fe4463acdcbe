"""Lets the calls of a pipeline take the names of settings that other programs use."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ldm.synonyms.sampling import translate
from ldm.synonyms.table import CALL, SAMPLING

P = ParamSpec("P")
R = TypeVar("R")


def takes_synonyms(call: Callable[P, R]) -> Callable[P, R]:
    """Translates keyword arguments of a pipeline's call, with a warning for each that has another name in ldm."""

    @wraps(call)
    def translated(*given: P.args, **named: P.kwargs) -> R:
        pipeline: Any = given[0]
        settings, notes = translate(named, SAMPLING | CALL, pipeline.settings.size)
        report: Any = named.get("on_warning")
        for note in notes:
            (report or _warn)(note)
        return call(*given, **settings)

    return translated


def _warn(note: str) -> None:
    warnings.warn(note, stacklevel=3)  # of the caller of `translated`
