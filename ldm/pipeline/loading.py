"""Reads the networks of a model with adapters and textual inversions, as often as these change."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ldm.nn.text_encoder import TextEncoder
from ldm.nn.vae import VAE
from ldm.pipeline.loras import LoraFolder, TaggedLora
from ldm.weights.adapters.merging import Given as AdapterFile
from ldm.weights.adapters.merging import merge_files, weighted
from ldm.weights.adapters.reader import networks_of
from ldm.weights.adapters.recognise import adapter_at, embedding_at
from ldm.weights.adapters.textual_inversion import Given as EmbeddingFile
from ldm.weights.adapters.textual_inversion import add_embedding, named
from ldm.weights.model import Model, open_model, read_model

WEIGHTS = (".safetensors", ".bin")
Files = tuple[object, ...]  # identifies files and their contents
Tagged = tuple[TaggedLora, ...]


@dataclass(frozen=True)
class Added:
    """The adapters to merge into a model and the textual inversions to add to its text encoder."""

    adapters: tuple[AdapterFile, ...] = ()
    embeddings: tuple[EmbeddingFile, ...] = ()

    @property
    def identity(self) -> Files:
        """Differs if the files, their weights or tokens, or their contents on the disk do."""
        adapters = [(adapter_at(path), weight) for path, weight in map(weighted, self.adapters)]
        tokens = [(embedding_at(path), token) for path, token in map(named, self.embeddings)]
        return tuple((file, how, _state(file)) for file, how in [*adapters, *tokens])


def added(adapters: Sequence[AdapterFile], embeddings: Sequence[EmbeddingFile]) -> Added:
    """Checks and returns what a caller adds. Raises ValueError for anything but lists of files, or of pairs."""
    for name, given in (("adapters", adapters), ("embeddings", embeddings)):
        if not isinstance(given, list | tuple):
            raise ValueError(
                f"{name} is {given!r}, but must be a list of files, or of pairs of a file and how to add it"
            )
    return Added(tuple(map(weighted, adapters)), tuple(map(named, embeddings)))


@dataclass(frozen=True)
class Source:
    """Where to read a model, the dtype of its networks, and the device on which they are kept."""

    path: str
    dtype: torch.dtype
    device: torch.device

    @property
    def identity(self) -> Files:
        """Differs if the model's file, or a file of weights in its folder, has changed on the disk."""
        place = open_model(self.path).source
        files = [place] if place.is_file() else [file for file in place.rglob("*") if file.suffix in WEIGHTS]
        return tuple((file, _state(file)) for file in sorted(files))

    def read(self, added: Added, device: torch.device | None = None) -> Model:
        """Returns the model without gradients, its denoising network on `device`, by default that of this source.

        Adapters are merged on the CPU into weights of the file's dtype, which are then rounded once.
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
        stage, text = model.first_stage.network, model.text_encoder.network
        place_frozen(stage, text, self.device, self.dtype)
        for network in model.backbone, stage, text:
            network.requires_grad_(False)
        return model


class Contents:
    """The files in the networks of a pipeline: a model, what is added to it, and the LoRA that tags of prompts name.

    Raises NotADirectoryError if there is no folder `lora_dir`, in which these are found.
    """

    def __init__(self, source: Source, added: Added, lora_dir: str | Path | None = None) -> None:
        self.lora_folder = None if lora_dir is None else LoraFolder(lora_dir)
        self._source, self._added = source, added
        self._model, self._files = source.identity, added.identity
        self._present: tuple[Files, Tagged] = self._files, ()

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Later networks are read in this dtype, to this device."""
        self._source = replace(self._source, device=device, dtype=dtype)

    @property
    def outdated(self) -> bool:
        """Whether the model has changed on the disk since it was loaded."""
        return self._source.identity != self._model

    def replace(self, added: Added) -> Model | None:
        """Returns the model with `added` in place of the files added before, as `tagged` does."""
        files = added.identity
        model = self._read(added, files, ())
        self._added, self._files = added, files
        return model

    def tagged(self, loras: Tagged) -> Model | None:
        """Returns the model with these LoRA, too, or None if the networks contain the same files already.

        Raises ValueError if the model or a file added to it has changed since it was loaded.
        """
        return self._read(self._added, self._files, loras)

    def _read(self, added: Added, files: Files, loras: Tagged) -> Model | None:
        if (files, loras) == self._present:
            return None
        if self.outdated or added.identity != files:
            raise ValueError(f"{self._source.path}, or a file added to it, has changed since: load it again")
        tags = tuple((lora.path, lora.weights) for lora in loras)
        model = self._source.read(replace(added, adapters=added.adapters + tags), torch.device("cpu"))
        self._present = files, loras
        return model


def place_frozen(stage: VAE, text: TextEncoder, device: torch.device, dtype: torch.dtype) -> None:
    """Moves the first stage and the text encoder; the first stage stays in float32 with float16, which overflows."""
    stage.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layers in stage.children():  # not `stage`: its scale stays in float32
        layers.to(torch.float32 if dtype == torch.float16 else dtype)
    text.to(device, dtype)


def _state(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size
