"""Files of adapters merged into the networks of a model."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ldm.adapters.change import Change
from ldm.adapters.merging import merge
from ldm.nn.backbone import Backbone
from ldm.nn.text_encoder import TextEncoder
from ldm.weights.adapters.names import TEXT, TEXT_2, UNET
from ldm.weights.adapters.reader import open_adapter

Given = str | Path | tuple[str | Path, float]  # a file, or a file and its weight, which is 1 otherwise


def weighted(given: Given) -> tuple[str | Path, float]:
    return given if isinstance(given, tuple) else (given, 1.0)


def merge_files(backbone: Backbone, text_encoder: TextEncoder, adapters: Sequence[Given]) -> None:
    """Merges adapters into the networks that they change, see `merge`; those of two files on one layer add up.

    Raises FileNotFoundError or ValueError for files that are no adapters, or are those of another model.
    """
    networks: dict[str, nn.Module] = {UNET: backbone, **dict(zip((TEXT, TEXT_2), text_encoder.towers, strict=False))}
    collected: dict[str, dict[str, list[tuple[Change, float]]]] = {}
    for path, weight in map(weighted, adapters):
        for network, changes in open_adapter(path).changes(backbone, text_encoder).items():
            for layer, change in changes.items():
                collected.setdefault(network, {}).setdefault(layer, []).append((change, weight))
    for network, layers in collected.items():
        merge(networks[network], layers)
