"""Merges adapter files into the networks of a model."""

from collections.abc import Mapping, Sequence
from math import isfinite
from numbers import Real
from pathlib import Path

from ldm.adapters.change import Change
from ldm.adapters.merging import merge
from ldm.adapters.targets import Network
from ldm.weights.adapters.reader import open_adapter

Given = str | Path | tuple[str | Path, float]  # a file with weight 1, or a file and its weight


def weighted(given: Given) -> tuple[str | Path, float]:
    """Returns the file and its weight. Raises ValueError if it is neither a file nor a pair with a finite number."""
    path, weight = given if isinstance(given, tuple | list) and len(given) == 2 else (given, 1.0)
    if not isinstance(path, str | Path) or not isinstance(weight, Real) or not isfinite(weight):
        raise ValueError(
            f'an adapter is given as {given!r}, but must be a file, or a file and a finite weight: ("a.pt", 0.8)'
        )
    return path, float(weight)


def merge_files(networks: Mapping[str, Network], adapters: Sequence[Given]) -> None:
    """Merges adapters into the networks that they change, see `merge`; changes of the same layer are added.

    `networks` maps names as used in files to the networks of a model. Raises FileNotFoundError or ValueError for files
    that are not adapters or belong to another model.
    """
    collected: dict[str, dict[str, list[tuple[Change, float]]]] = {}
    for path, weight in map(weighted, adapters):
        for network, changes in open_adapter(path).changes(networks).items():
            for layer, change in changes.items():
                collected.setdefault(network, {}).setdefault(layer, []).append((change, weight))
    for network, layers in collected.items():
        merge(networks[network], layers)
