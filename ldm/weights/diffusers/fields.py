"""Reads and validates the fields of diffusers and transformers configs; unsupported fields are refused by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.errors import shortened

Config = dict[str, Any]
MAX_COUNT = 2**20  # upper bound of integers in a config, far above any width, token count or number of training steps
MAX_NUMBER = 1e30
MAX_LIST = 64  # upper bound on the length of a list, which has one value per level of a network


@dataclass(frozen=True)
class Fields:
    """Lists how ldm treats each field of a config; fields that are not listed are refused by name.

    `honoured` fields change what is built. `fixed` fields must have the given value, or one of those in a tuple,
    because ldm supports no other. `ignored` fields have no effect on samples.
    """

    honoured: frozenset[str]
    fixed: Config = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    def check(self, given: Mapping[str, Any], source: Path) -> None:
        """Raises ValueError if a fixed field has another value, or if an unknown field is set."""
        other = [
            f"{name}={given[name]}"
            for name, value in self.fixed.items()
            if name in given and not _is(given[name], value)
        ]
        known = self.honoured | self.fixed.keys() | self.ignored
        other += [f"{name}={given[name]}" for name in given if _unknown(name, given[name], known)]
        if other:
            raise ValueError(
                f"{source} asks for {', '.join(other)}, which ldm does not have; "
                "give a model of Stable Diffusion 1.x or 2.x"
            )


def _is(given: Any, value: Any) -> bool:
    """Returns whether a value equals the given one, or an alternative in its tuple; true does not equal 1."""
    alternatives = value if isinstance(value, tuple) else (value,)
    return any(given == item and isinstance(given, bool) == isinstance(item, bool) for item in alternatives)


def _unknown(name: str, value: Any, known: frozenset[str]) -> bool:
    """Returns whether a field is unknown and set; names with a leading underscore describe the file and are ignored."""
    return name not in known and not name.startswith("_") and value is not None


@dataclass(frozen=True)
class Given:
    """Reads the fields of a config and checks their types and ranges; null counts as unset."""

    config: Mapping[str, Any]
    source: Path

    def integer(self, name: str, default: int, least: int = 1, most: int = MAX_COUNT) -> int:
        return self._checked(name, self._value(name, default), least, most)

    def integers(self, name: str, default: Sequence[int]) -> list[int]:
        """Returns a list of positive integers; a single integer counts as a list of one."""
        values = self._value(name, default)
        listed = list(values) if isinstance(values, list | tuple) else [values]
        if not 1 <= len(listed) <= MAX_LIST:
            raise self._error(name, values, f"a list of 1 to {MAX_LIST} integers")
        return [self._checked(name, value, 1, MAX_COUNT) for value in listed]

    def number(self, name: str, default: float | None = None, above: float = 0.0, most: float = MAX_NUMBER) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most:
            raise self._error(name, value, f"a number above {above:g} and at most {most:g}")
        return float(value)

    def numbers(self, name: str, above: float = 0.0, below: float = 1.0, most: int = MAX_COUNT) -> list[float]:
        """Returns a list of numbers within exclusive bounds."""
        values = self.config.get(name)
        if not isinstance(values, list) or not 1 <= len(values) <= most:
            raise self._error(name, values, f"a list of 1 to {most} numbers")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
                raise self._error(name, value, f"numbers above {above:g} and below {below:g}")
        return [float(value) for value in values]

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._error(name, value, "true or false")
        return value

    def choice(self, name: str, default: str, *choices: str) -> str:
        value = self._value(name, default)
        if value not in choices:
            raise self._error(name, value, f"one of {', '.join(choices)}")
        return str(value)

    def names(self, name: str, default: Sequence[str]) -> list[str]:
        values = self._value(name, default)
        listed = isinstance(values, list | tuple) and 1 <= len(values) <= MAX_LIST
        if not listed or not all(isinstance(value, str) for value in values):
            raise self._error(name, values, f"a list of 1 to {MAX_LIST} names")
        return list(values)

    def has(self, name: str) -> bool:
        return self.config.get(name) is not None

    def _value(self, name: str, default: Any) -> Any:
        value = self.config.get(name)
        return default if value is None else value

    def _checked(self, name: str, value: Any, least: int, most: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._error(name, value, f"an integer from {least} to {most}")
        return value

    def _error(self, name: str, value: Any, expected: str) -> ValueError:
        return ValueError(
            f"{self.source} has {name}={shortened(value)}, but ldm needs {expected}; give a model that has it"
        )
