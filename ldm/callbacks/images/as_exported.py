"""Replaces an adapter in training by what its exported file holds, so that images show what the file will do."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from ldm.adapters.low_rank import LowRank
from ldm.adapters.merging import merge, restore
from ldm.adapters.targets import Network, low_rank_layers, replace_layer
from ldm.adapters.text import NewVectors
from ldm.callbacks.export import write_files
from ldm.files import temporary_folder
from ldm.nn.backbone import Backbone
from ldm.nn.text_encoder import TextEncoder
from ldm.weights.adapters.reader import networks_of, open_adapter
from ldm.weights.adapters.textual_inversion import read_embedding


@contextmanager
def as_exported(
    trainer: Trainer, module: LightningModule, backbone: Backbone, text_encoder: TextEncoder
) -> Iterator[None]:
    """Writes the file that the run would export now, reads it, and merges it into the base network.

    Applies to low-rank adapters and new tokens; other networks, and those sharded over several GPUs, are unchanged.
    Afterwards all layers and weights are restored, bit for bit.
    """
    adapted, vectors = low_rank_layers(module), [part for part in module.modules() if isinstance(part, NewVectors)]
    if isinstance(trainer.strategy, ModelParallelStrategy) or not (adapted or vectors):
        yield
        return
    with temporary_folder(Path(tempfile.gettempdir(), "ldm")) as folder:
        write_files(module, folder, torch.float32)
        with _merged(folder, networks_of(backbone, text_encoder)) if adapted else _read(folder, vectors):
            yield


@contextmanager
def _merged(folder: Path, networks: Mapping[str, Network]) -> Iterator[None]:
    """Merges the file's changes into the plain layers of the networks."""
    changes = open_adapter(folder).changes(networks)
    layers: dict[str, dict[str, LowRank]] = {name: low_rank_layers(network) for name, network in networks.items()}
    originals = {}
    try:
        for name, adapted in layers.items():
            for layer, wrapper in adapted.items():
                replace_layer(networks[name], layer, wrapper.base)
        for name, own in changes.items():
            originals[name] = merge(networks[name], {layer: [(change, 1.0)] for layer, change in own.items()})
        yield
    finally:
        for name, weights in originals.items():
            restore(networks[name], weights)
        for name, adapted in layers.items():
            for layer, wrapper in adapted.items():
                replace_layer(networks[name], layer, wrapper)


@contextmanager
def _read(folder: Path, tables: list[NewVectors]) -> Iterator[None]:
    """Replaces the vectors of the new token by those of the file."""
    trained: list[Tensor] = [table.vectors.data for table in tables]
    try:
        for table, vectors in zip(tables, read_embedding(folder).vectors.values(), strict=True):
            table.vectors.data = vectors.to(table.vectors.data)
        yield
    finally:
        for table, vectors in zip(tables, trained, strict=True):
            table.vectors.data = vectors
