"""Options of samplers and spacings, by name."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Name → default: what a sampler or spacing may be told besides what all are."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def choose(kind: str, known: Mapping[str, F], name: str, options: Mapping[str, Any]) -> F:
    """The function of that name with its options settled. Raises ValueError for names that are not known."""
    if name not in known:
        raise ValueError(f"{kind} is {name!r}, but must be one of {', '.join(known)}")
    takes = options_of(known[name])
    if unknown := [option for option in options if option not in takes]:
        listing = ", ".join(takes) or "none"
        raise ValueError(f"{kind}={name} has no option {unknown[0]!r}; its options are: {listing}")
    return partial(known[name], **options)  # type: ignore[return-value]
