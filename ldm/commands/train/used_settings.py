"""Finds the settings of a config that a training run reads."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Settings that train.py reads or builds; others matter only if one of these refers to them.
ROOTS = (
    *("accept_changes", "name", "plan", "rehearsal", "resume", "run_dir", "seed"),
    *("attention", "callbacks", "data.module", "ema", "evaluation", "logger", "precision", "trainer", "training"),
)
REFERENCE = re.compile(r"\.*[A-Za-z_][\w.]*")


def is_read(config: Mapping[str, Any], key: str) -> bool:
    """Returns whether a dotted key of an unresolved config is read, or contains or is part of a setting that is."""
    return any(f"{used}.".startswith(f"{key}.") or f"{key}.".startswith(f"{used}.") for used in used_settings(config))


def used_settings(config: Mapping[str, Any]) -> set[str]:
    """Returns the roots and everything that they refer to by interpolations, directly or indirectly."""
    values = dict(_dotted_items(config, ""))
    used: set[str] = set()
    pending = [root for root in ROOTS if root in values]
    while pending:
        used.add(key := pending.pop())
        below = [(name, value) for name, value in values.items() if f"{name}.".startswith(f"{key}.")]
        pending += {target for name, value in below for target in _references(name, value) if target in values} - used
    return used


def _references(key: str, value: Any) -> Iterator[str]:
    """Yields the settings that a value may refer to; n leading dots refer to the n-th group that contains the key."""
    if not isinstance(value, str) or "${" not in value:
        return
    for name in REFERENCE.findall(value):
        up = len(name) - len(name.lstrip("."))
        yield ".".join([*key.split(".")[:-up], name[up:]]) if up else name


def _dotted_items(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields every dotted key with its value, including groups and list items."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        yield (key := f"{path}.{name}".lstrip(".")), value
        yield from _dotted_items(value, key)
