"""Looks up samplers, spacings and thresholdings by name, and validates their options."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from math import inf, isfinite
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the default of each option of a sampler or spacing: of its parameters that have one."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def choose(kind: str, known: Mapping[str, F], name: str, options: Mapping[str, Any]) -> F:
    """Returns the function of that name with its options bound.

    Raises ValueError for an unknown name or option, and for an option that must be true or false but is not.
    """
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{kind} is {name!r}, but must be one of {', '.join(known)}")
    defaults = options_of(known[name])
    if unknown := [option for option in options if option not in defaults]:
        listing = ", ".join(defaults) or "none"
        raise ValueError(f"{kind}={name} has no option {unknown[0]!r}; its options are: {listing}")
    for option, value in options.items():
        if isinstance(defaults[option], bool) and not isinstance(value, bool):
            raise ValueError(f"{kind}={name}'s option {option} is {value!r}, but must be true or false")
    return partial(known[name], **options)  # type: ignore[return-value]


def check_range(name: str, value: float, low: float, high: float = inf) -> None:
    """Raises ValueError unless low <= value <= high and, if `low` is an int, the value is one too."""
    integer = isinstance(low, int)
    kinds = int if integer else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        bounds = f"from {low} to {high}" if isfinite(high) else f"of at least {low}"
        raise ValueError(f"{name} is {value!r}, but must be a {'whole ' if integer else ''}number {bounds}")


def check_choice(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")
