"""Opens the networks at a path, to check, load and convert them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.weights.arrange import to_ours, to_theirs
from ldm.weights.compvis.reader import ReadOptions
from ldm.weights.info import ContentsInfo, NetworkInfo
from ldm.weights.keymaps import NATIVE, Entry, entries
from ldm.weights.kinds import ADAPTER
from ldm.weights.native import build, fingerprint_of
from ldm.weights.recognise import recognise
from ldm.weights.storage.tensors import Tensors, refuse_mismatch
from ldm.weights.storage.values import DTYPES, check_finite, chunks, header, on_meta, verified


@dataclass(frozen=True)
class StoredNetwork(NetworkInfo):
    """A network on disk that can be loaded."""

    def build(self) -> nn.Module:
        """Builds the network on the meta device. Raises ValueError for an invalid architecture."""
        return build({"kind": self.kind, "config": self.config}, self.tensors.source)

    @cached_property
    def blueprint(self) -> nn.Module:
        """The network on the meta device, shared and therefore read-only."""
        return self.build()

    @cached_property
    def entries(self) -> list[Entry]:
        if self.kind == ADAPTER:
            return entries(self.kind, NATIVE, self.config, list(self.tensors))
        return entries(self.kind, self.layout, self.config, list(self.blueprint.state_dict()))

    @property
    def full_config(self) -> dict[str, Any]:
        """The architecture, including defaults."""
        return cast(dict[str, Any], self.blueprint.config)

    def check(self) -> None:
        """Raises a ValueError that lists all tensors that are missing, unexpected or of the wrong shape."""
        expected = to_theirs(self.entries, self.blueprint.state_dict())
        forms = {entry.theirs: entry.form for entry in self.entries}
        refuse_mismatch(
            self.tensors.source,
            type(self.blueprint).__name__,
            missing=expected.keys() - self.tensors.keys(),
            unexpected=self.tensors.keys() - expected.keys(),
            misshapen=[
                f"{name} {list(self.tensors[name].shape)} instead of {list(tensor.shape)}"
                for name, tensor in expected.items()
                if name in self.tensors and not _fits(self.tensors[name].shape, tuple(tensor.shape), forms[name])
            ],
        )

    def load(
        self, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu", channels_last: bool = False
    ) -> nn.Module:
        """Loads the network in evaluation mode, in this `dtype` (None: the file's), on the device.

        Tensors that need no conversion stay mapped to the file; of the others at most a chunk is in memory twice.
        Raises ValueError for tensors that do not fit, or that contain NaN or infinity.
        """
        self.check()
        network, state = self.build(), {}
        stored = {entry.theirs: self.tensors[entry.theirs] for entry in self.entries}
        floats = {DTYPES[tensor.dtype] for tensor in stored.values() if tensor.is_float}
        as_stored = torch.device(device).type == "cpu" and not channels_last and (dtype is None or floats <= {dtype})
        for group in [list(stored)] if as_stored else chunks(stored):  # a single read maps the file only once
            for name, tensor in self._values(set(group), dtype, torch.device(device), channels_last).items():
                check_finite(name, tensor, self.tensors.source)
                state[name] = tensor
        network.load_state_dict(state, assign=True)
        return network.eval()

    def _values(
        self, names: set[str], dtype: torch.dtype | None, device: torch.device, channels_last: bool
    ) -> dict[str, Tensor]:
        """Reads and converts the tensors `names`; no intermediate tensor outlives the call."""
        values = to_ours([entry for entry in self.entries if entry.theirs in names], self.tensors.read(names))
        return {
            name: tensor.to(
                device,
                dtype if dtype and tensor.is_floating_point() else tensor.dtype,
                memory_format=torch.channels_last if channels_last and tensor.ndim == 4 else torch.preserve_format,
            )
            for name, tensor in values.items()
        }

    def in_layout(self, layout: str) -> Tensors:
        """Returns the tensors with the names and shapes of another layout."""
        targets = entries(self.kind, layout, self.config, [entry.ours for entry in self.entries])
        sources = {entry.ours: entry for entry in self.entries}

        def convert(wanted: list[Entry], values: dict[str, Tensor]) -> dict[str, Tensor]:
            return to_theirs(wanted, to_ours([sources[entry.ours] for entry in wanted], values))

        def read(names: Iterable[str]) -> dict[str, Tensor]:
            chosen = set(names)
            wanted = [entry for entry in targets if entry.theirs in chosen]
            needed = dict.fromkeys(sources[entry.ours].theirs for entry in wanted)
            return convert(wanted, self.tensors.read(needed))

        converted = convert(targets, {name: on_meta(stored) for name, stored in self.tensors.items()})
        return replace(self.tensors, headers={name: header(tensor) for name, tensor in converted.items()}, read=read)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the network in float32, whatever dtype it is loaded in, computed chunk by chunk.

        Raises ValueError as `load` does.
        """
        if self.kind != ADAPTER:
            self.check()
        tensors = verified(self.in_layout(NATIVE), torch.float32)

        def values() -> Iterator[tuple[str, Tensor]]:
            for group in chunks({name: tensors[name] for name in sorted(tensors)}):
                yield from sorted(tensors.read(group).items())

        return fingerprint_of(values())

    def with_config(self, **config: Any) -> "StoredNetwork":
        """Returns the smaller network of a changed `config`, such as a text tower without its last layers."""
        smaller = replace(self, config=self.config | config)
        kept = {entry.theirs for entry in smaller.entries}
        return replace(smaller, tensors=self.tensors.renamed({name: name for name in self.tensors if name in kept}))


@dataclass(frozen=True)
class Contents(ContentsInfo):
    """The networks at a path, which can be loaded."""

    networks: Mapping[str, StoredNetwork]

    @property
    def denoising(self) -> StoredNetwork:
        """The denoising network. Raises ValueError if there is none."""
        if self.backbone is None:
            raise ValueError(
                f"{self.source} is {self.description} and holds no denoising network "
                f"(it holds {', '.join(self.networks)}); give a model, a checkpoint or a run"
            )
        return self.networks[self.backbone]

    def network(self, kind: str) -> StoredNetwork:
        """Returns the network of this kind. Raises ValueError if there is none."""
        if kind not in self.networks:
            raise ValueError(
                f"{self.source} is {self.description} and holds no {kind} (it holds {', '.join(self.networks)}); "
                "give a file or folder that contains one"
            )
        return self.networks[kind]


def open_contents(path: str | Path, options: ReadOptions = ReadOptions(), variant: str | None = None) -> Contents:  # noqa: B008 - a constant
    """Opens what `recognise` identifies at `path`, ready to be loaded; raises the same errors."""
    info = recognise(path, options, variant)
    networks = {kind: StoredNetwork(**vars(network)) for kind, network in info.networks.items()}
    return Contents(**vars(info) | {"networks": networks})


def _fits(shape: tuple[int, ...], expected: tuple[int, ...], form: str) -> bool:
    if form in ("1x1", "linear") and len(shape) > 1 < len(expected):
        return (shape[0], prod(shape[1:])) == (expected[0], prod(expected[1:]))
    return shape == expected
