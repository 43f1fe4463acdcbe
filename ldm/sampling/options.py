"""Options of samplers and spacings, by name."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from math import inf, isfinite
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Name → default: what a sampler or spacing may be told besides what all are."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def choose(kind: str, known: Mapping[str, F], name: str, options: Mapping[str, Any]) -> F:
    """The function of that name with its options settled.

    Raises ValueError for names that are not known, and for what is no truth value where one is the default.
    """
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{kind} is {name!r}, but must be one of {', '.join(known)}")
    takes = options_of(known[name])
    if unknown := [option for option in options if option not in takes]:
        listing = ", ".join(takes) or "none"
        raise ValueError(f"{kind}={name} has no option {unknown[0]!r}; its options are: {listing}")
    for option, value in options.items():
        if isinstance(takes[option], bool) and not isinstance(value, bool):
            raise ValueError(f"{kind}={name}'s option {option} is {value!r}, but must be true or false")
    return partial(known[name], **options)  # type: ignore[return-value]


def check_range(name: str, value: float, low: float, high: float = inf) -> None:
    """Raises ValueError unless low <= value <= high, and for a fraction where `low` is a whole number."""
    whole = isinstance(low, int)
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        bounds = f"from {low} to {high}" if isfinite(high) else f"from {low} up"
        raise ValueError(f"{name} is {value!r}, but must be a {'whole ' if whole else ''}number {bounds}")


def check_choice(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")
