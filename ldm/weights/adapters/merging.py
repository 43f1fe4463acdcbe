"""Merges adapter files into the networks of a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.adapters.change import Change
from ldm.adapters.merging import merge
from ldm.adapters.targets import Network
from ldm.weights.adapters.reader import open_adapter

Given = str | Path | tuple[str | Path, float]  # a file with weight 1, or a file and its weight


def weighted(given: Given) -> tuple[str | Path, float]:
    return given if isinstance(given, tuple) else (given, 1.0)


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
