"""Merges adapter files into the networks of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from pathlib import Path

from ldm.adapters.change import Change
from ldm.adapters.merging import merge
from ldm.adapters.targets import Network
from ldm.weights.adapters.names import UNET
from ldm.weights.adapters.reader import open_adapter


@dataclass(frozen=True)
class Weights:
    """The weights of an adapter in the denoising network and in the text encoder."""

    unet: float
    text_encoder: float

    def of(self, network: str) -> float:
        return self.unet if network == UNET else self.text_encoder


Given = str | Path | tuple[str | Path, float | Weights]  # a file with weight 1, or a file and its weight or weights


def weighted(given: Given) -> tuple[str | Path, Weights]:
    """Returns the file and its weights. Raises ValueError if it is neither a file nor a pair with finite numbers."""
    path, weight = given if isinstance(given, tuple | list) and len(given) == 2 else (given, 1.0)
    both = (weight.unet, weight.text_encoder) if isinstance(weight, Weights) else (weight, weight)
    if not isinstance(path, str | Path) or not all(isinstance(one, Real) and isfinite(one) for one in both):
        raise ValueError(
            f'an adapter is given as {given!r}, but must be a file, or a file and a finite weight: ("a.pt", 0.8)'
        )
    return path, Weights(*map(float, both))


def merge_files(networks: Mapping[str, Network], adapters: Sequence[Given]) -> None:
    """Merges adapters into the networks that they change, see `merge`; changes of the same layer are added.

    `networks` maps names as used in files to the networks of a model. Raises FileNotFoundError or ValueError for files
    that are not adapters or belong to another model.
    """
    collected: dict[str, dict[str, list[tuple[Change, float]]]] = {}
    for path, weights in map(weighted, adapters):
        for network, changes in open_adapter(path).changes(networks).items():
            for layer, change in changes.items():
                collected.setdefault(network, {}).setdefault(layer, []).append((change, weights.of(network)))
    for network, layers in collected.items():
        merge(networks[network], layers)
