"""Reads adapter files in every layout: their layers by name, and the changes for a network."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.adapters.change import Change, fits
from ldm.adapters.targets import Network, layers
from ldm.nn.backbone import Backbone
from ldm.nn.text_encoder import TextEncoder
from ldm.weights.adapters.changes import change_of
from ldm.weights.adapters.layouts import Layer, is_adapter, layers_of, layout_of
from ldm.weights.adapters.names import TEXT, TEXT_2, UNET, own_names
from ldm.weights.adapters.peft_settings import settings_in
from ldm.weights.adapters.recognise import adapter_at
from ldm.weights.storage.opening import open_tensors
from ldm.weights.storage.tensors import Tensors
from ldm.weights.storage.values import check_finite


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file in any layout, and the layers that it changes."""

    tensors: Tensors
    layers: list[Layer]

    @property
    def source(self) -> Path:
        return self.tensors.source

    @property
    def layout(self) -> str:
        return layout_of(self.layers)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.tensors.metadata

    @cached_property
    def networks(self) -> list[str]:
        return list(dict.fromkeys(layer.network for layer in self.layers))

    def change(self, layer: Layer, shape: tuple[int, ...] | None = None) -> Change:
        """Returns the change of a layer with a weight of this shape. Raises ValueError if the tensors are invalid."""
        parts = self.tensors.read(layer.parts.values())
        for name, tensor in parts.items():
            check_finite(name, tensor, self.source)
        values = {part: parts[name] for part, name in layer.parts.items()}
        try:
            return change_of(values, self._alpha(layer, values), shape or ())
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{self.source}: {layer.label} {error}") from error

    def _alpha(self, layer: Layer, values: Mapping[str, Tensor]) -> float | None:
        if "alpha" in values:
            if values["alpha"].numel() != 1:
                raise ValueError(f"holds an alpha of {values['alpha'].numel()} numbers")
            return float(values["alpha"])
        if "down" not in values or not values["down"].ndim:  # `change_of` refuses a factor without axes
            return None
        settings = settings_in(self.source, self.metadata, layer.network, layer.prefix)
        return settings.alpha_of(layer.name, len(values["down"]))

    def by_public_name(self) -> dict[str, dict[str, Change]]:
        """Returns the changes of each network by the layers' names in diffusers and transformers, for conversion."""
        return {
            network: {layer.name: self.change(layer) for layer in self.layers if layer.network == network}
            for network in self.networks
        }

    def changes_for(self, network: str, module: Network) -> dict[str, Change]:
        """Returns the changes of `module`, which the file calls `network`, by the names of its layers.

        Raises ValueError if the module lacks a layer or has a weight of another shape.
        """
        kind = module.kind if isinstance(module, Backbone) else "text_tower"
        names, found = own_names(kind, module.config, layers(module)), layers(module)
        changes, missing, misshapen = {}, [], []
        for layer in self.layers:
            if layer.network != network:
                continue
            if layer.name not in names:
                missing.append(layer.label)
                continue
            own = names[layer.name]
            shape = tuple(found[own].weight.shape)
            if own in changes:
                misshapen.append(f"{layer.label} changes a layer that is changed under another name already")
            changes[own] = change = self.change(layer, shape)
            if not fits(change.shape, shape):
                misshapen.append(
                    f"{layer.label} changes a weight {list(change.shape)}, but that of the layer is {list(shape)}"
                )
        self._refuse(kind, missing, misshapen)
        return changes

    def _refuse(self, kind: str, missing: list[str], misshapen: list[str]) -> None:
        """Raises one ValueError for all missing and misshapen layers, if there are any."""
        problems = []
        if missing:
            problems.append(
                f"{len(missing)} of its layers are not in this {kind.replace('_', ' ')}: {_shortened(missing, 3)}"
            )
        if misshapen:
            problems.append(_shortened(misshapen, 2))
        if problems:
            raise ValueError(
                f"the adapter {self._described} is one of another model ({'; '.join(problems)}): give one that was "
                "made for this model"
            )

    @property
    def _described(self) -> str:
        """The path, and the model that the file was made for if its metadata say so."""
        model = self.metadata.get("ss_base_model_version") or self.metadata.get("modelspec.architecture")
        return f"{self.source}, made for {model}," if model else str(self.source)

    def changes(self, networks: Mapping[str, Network]) -> dict[str, dict[str, Change]]:
        """Returns the changes of each network that the file changes; see `changes_for`.

        `networks` is keyed by their names in files. Raises ValueError if the file changes a network that is not given.
        """
        if foreign := [network for network in self.networks if network not in networks]:
            raise ValueError(
                f"the adapter {self._described} changes the network {foreign[0]}, but this model has "
                f"{', '.join(networks)}: give an adapter that was made for this model"
            )
        return {network: self.changes_for(network, networks[network]) for network in self.networks}


def networks_of(backbone: Backbone, text_encoder: TextEncoder) -> dict[str, Network]:
    """Returns the networks of a model by their names in files."""
    return {UNET: backbone, **dict(zip((TEXT, TEXT_2), text_encoder.towers, strict=False))}


def open_adapter(path: str | Path) -> AdapterFile:
    """Opens the adapter in a file, or in a folder of a run, of diffusers or of peft.

    Raises FileNotFoundError, or ValueError if the file is not an adapter or contains unknown tensors.
    """
    file = adapter_at(path)
    tensors = open_tensors(file)
    found, strays = layers_of(tensors)
    if not is_adapter(tensors):
        raise ValueError(
            f"{path} is no adapter (its tensors are {_shortened(list(tensors), 3) or 'none'}); give a LoRA of kohya, "
            "diffusers, peft, LyCORIS or ldm"
        )
    if strays:
        raise ValueError(
            f"{path} holds tensors of an adapter that ldm does not know, and leaves out none "
            f"({len(strays)}: {_shortened(strays, 3)})"
        )
    return AdapterFile(tensors, found)


def _shortened(texts: list[str], most: int) -> str:
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
