"""Searches a resolved config (nested dictionaries and lists with `_target_` keys) and builds its networks."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch


def find(node: Any, key: str) -> Any:
    """Returns the first value under `key` in nested dictionaries and lists, or None."""
    if isinstance(node, dict) and key in node:
        return node[key]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next((found for child in children if (found := find(child, key)) is not None), None)


def targets(node: Any) -> Iterator[str]:
    """Yields every `_target_` in nested dictionaries and lists."""
    if isinstance(node, dict) and "_target_" in node:
        yield node["_target_"]
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(child)


def build(node: Any, notes: list[str]) -> Any:
    """Builds a network on the meta device; omits arguments that are objects other than networks."""
    if not isinstance(node, dict) or "_target_" not in node:
        return node
    arguments = {}
    for key, value in node.items():
        if isinstance(value, dict) and not value.get("_target_", "ldm.nn.").startswith("ldm.nn."):
            notes.append(f"{key} keeps its default, because {value['_target_']} may need data")
        elif key != "_target_":
            arguments[key] = build(value, notes)
    with torch.device("meta"):
        return import_target(node["_target_"])(**arguments)


def import_target(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(import_module(module), name)
