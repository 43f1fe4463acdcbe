"""Looking into a resolved config: nested dictionaries and lists that name classes by `_target_`."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch


def find(node: Any, key: str) -> Any:
    """The first value under `key` in nested dictionaries and lists, or None."""
    if isinstance(node, dict) and key in node:
        return node[key]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next((found for child in children if (found := find(child, key)) is not None), None)


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` in nested dictionaries and lists."""
    if isinstance(node, dict) and "_target_" in node:
        yield node["_target_"]
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(child)


def build(node: Any, notes: list[str]) -> Any:
    """The network of a config node, on the meta device; an argument made of no network keeps its default."""
    if not isinstance(node, dict) or "_target_" not in node:
        return node
    arguments = {}
    for key, value in node.items():
        if isinstance(value, dict) and not value.get("_target_", "").startswith("ldm.nn."):
            notes.append(f"{key} is left to its default, because {value.get('_target_')} could need data")
        elif key != "_target_":
            arguments[key] = build(value, notes)
    with torch.device("meta"):
        return named(node["_target_"])(**arguments)


def named(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(import_module(module), name)
