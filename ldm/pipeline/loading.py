"""Reads the networks of a model with adapters and textual inversions, as often as these change."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.weights.adapters.merging import Given as AdapterFile
from ldm.weights.adapters.merging import merge_files, weighted
from ldm.weights.adapters.reader import networks_of
from ldm.weights.adapters.recognise import adapter_at, embedding_at
from ldm.weights.adapters.textual_inversion import Given as EmbeddingFile
from ldm.weights.adapters.textual_inversion import add_embedding
from ldm.weights.model import Model, open_model, read_model

WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Added:
    """The adapters to merge into a model and the textual inversions to add to its text encoder."""

    adapters: tuple[AdapterFile, ...] = ()
    embeddings: tuple[EmbeddingFile, ...] = ()

    @property
    def identity(self) -> tuple[object, ...]:
        """Differs if the files, their weights or tokens, or their contents on the disk do."""
        adapters = [(adapter_at(path), weight) for path, weight in map(weighted, self.adapters)]
        embeddings = [given if isinstance(given, tuple) else (given, None) for given in self.embeddings]
        tokens = [(embedding_at(path), token) for path, token in embeddings]
        return tuple((file, how, _state(file)) for file, how in [*adapters, *tokens])


@dataclass(frozen=True)
class Source:
    """Where to read a model, the dtype of its networks, and the device on which they are kept."""

    path: str
    dtype: torch.dtype
    device: torch.device

    @property
    def identity(self) -> tuple[object, ...]:
        """Differs if the model's file, or a file of weights in its folder, has changed on the disk."""
        place = open_model(self.path).source
        files = [place] if place.is_file() else [file for file in place.rglob("*") if file.suffix in WEIGHTS]
        return tuple((file, _state(file)) for file in sorted(files))

    def read(self, added: Added, device: torch.device | None = None) -> Model:
        """Returns the model without gradients, its denoising network on `device`, by default that of this source.

        Adapters are merged on the CPU into weights of the file's dtype, which are then rounded once. With float16 the
        first stage stays in float32, because it would overflow.
        """
        device = device or self.device
        if added.adapters:
            model = read_model(self.path, dtype=None, channels_last=True)
            merge_files(networks_of(model.backbone, model.text_encoder.network), added.adapters)
            model.backbone.to(device, self.dtype)
        else:
            model = read_model(self.path, self.dtype, device=device, channels_last=True)
        for embedding in added.embeddings:
            add_embedding(model.text_encoder.network, embedding)
        stage = model.first_stage.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for layers in stage.children() if self.dtype != torch.float16 else ():  # not `stage`: its scale stays float32
            layers.to(self.dtype)
        model.text_encoder.network.to(self.device, self.dtype)
        for network in model.backbone, stage, model.text_encoder.network:
            network.requires_grad_(False)
        return model


def _state(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size
