"""Which settings of a config a training run reads."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

# What train.py reads or builds; the rest of a config matters where one of these refers to it.
ROOTS = (
    *("accept_changes", "name", "plan", "resume", "run_dir", "seed"),
    *("callbacks", "data.module", "ema", "evaluation", "logger", "precision", "trainer", "training"),
)
REFERENCE = re.compile(r"\.*[A-Za-z_][\w.]*")


def is_read(config: Mapping[str, Any], key: str) -> bool:
    """Whether a dotted key of an unresolved config is read, or holds or belongs to a setting that is."""
    return any(f"{one}.".startswith(f"{key}.") or f"{key}.".startswith(f"{one}.") for one in read(config))


def read(config: Mapping[str, Any]) -> set[str]:
    """The roots, and what they refer to by interpolations, directly or in turn."""
    values = dict(_walk(config, ""))
    found: set[str] = set()
    waiting = [root for root in ROOTS if root in values]
    while waiting:
        found.add(key := waiting.pop())
        below = [(name, value) for name, value in values.items() if f"{name}.".startswith(f"{key}.")]
        waiting += {to for name, value in below for to in _references(name, value) if to in values} - found
    return found


def _references(key: str, value: Any) -> Iterator[str]:
    """The settings that a value may refer to; a leading dot is the group of the key, each further one a group above."""
    if not isinstance(value, str) or "${" not in value:
        return
    for name in REFERENCE.findall(value):
        up = len(name) - len(name.lstrip("."))
        yield ".".join([*key.split(".")[:-up], name[up:]]) if up else name


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, groups and items of lists among them."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        yield (key := f"{path}.{name}".lstrip(".")), value
        yield from _walk(value, key)
