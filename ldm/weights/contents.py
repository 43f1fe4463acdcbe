"""Networks on disk, to check, load and rename."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.weights.arrange import to_ours, to_theirs
from ldm.weights.compvis.reader import Choices
from ldm.weights.info import ContentsInfo, NetworkInfo
from ldm.weights.keymaps import NATIVE, Entry, entries
from ldm.weights.kinds import ADAPTER
from ldm.weights.native import build, fingerprint_of
from ldm.weights.recognise import recognise
from ldm.weights.storage.tensors import Tensors, refuse_misfits
from ldm.weights.storage.values import DTYPES, check_finite, chunks, header, on_meta, verified


@dataclass(frozen=True)
class StoredNetwork(NetworkInfo):
    """A network on disk that can be loaded."""

    def build(self) -> nn.Module:
        """The network on the meta device. Raises ValueError for an architecture that cannot be."""
        return build({"kind": self.kind, "config": self.config}, self.tensors.source)

    @cached_property
    def blueprint(self) -> nn.Module:
        """The network on the meta device, to look at only."""
        return self.build()

    @cached_property
    def entries(self) -> list[Entry]:
        if self.kind == ADAPTER:
            return entries(self.kind, NATIVE, self.config, list(self.tensors))
        return entries(self.kind, self.layout, self.config, list(self.blueprint.state_dict()))

    @property
    def full_config(self) -> dict[str, Any]:
        """The architecture with its defaults."""
        return cast(dict[str, Any], self.blueprint.config)

    def check(self) -> None:
        """Raises ValueError that lists all tensors that are missing, too many or of another shape."""
        expected = to_theirs(self.entries, self.blueprint.state_dict())
        forms = {entry.theirs: entry.form for entry in self.entries}
        refuse_misfits(
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
        """The network in evaluation mode, in this `dtype` (the file's, for None), on the device.

        Tensors that are as they shall be stay mapped to the file; the others never lie in memory twice, but for a
        chunk. Raises ValueError for tensors that do not fit, or that hold NaN or infinity.
        """
        self.check()
        network, state = self.build(), {}
        stored = {entry.theirs: self.tensors[entry.theirs] for entry in self.entries}
        floats = {DTYPES[one.dtype] for one in stored.values() if one.is_float}
        as_stored = torch.device(device).type == "cpu" and not channels_last and (dtype is None or floats <= {dtype})
        for group in [list(stored)] if as_stored else chunks(stored):  # in one piece it takes one mapping of the file
            for name, tensor in self._values(set(group), dtype, torch.device(device), channels_last).items():
                check_finite(name, tensor, self.tensors.source)
                state[name] = tensor
        network.load_state_dict(state, assign=True)
        return network.eval()

    def _values(
        self, names: set[str], dtype: torch.dtype | None, device: torch.device, channels_last: bool
    ) -> dict[str, Tensor]:
        """Nothing that was read outlives the call, unless it is returned."""
        read = to_ours([entry for entry in self.entries if entry.theirs in names], self.tensors.read(names))
        return {
            name: tensor.to(
                device,
                dtype if dtype and tensor.is_floating_point() else tensor.dtype,
                memory_format=torch.channels_last if channels_last and tensor.ndim == 4 else torch.preserve_format,
            )
            for name, tensor in read.items()
        }

    def arranged(self, layout: str) -> Tensors:
        """The tensors under the names, and in the shapes, of another layout."""
        targets = entries(self.kind, layout, self.config, [entry.ours for entry in self.entries])
        sources = {entry.ours: entry for entry in self.entries}

        def arrange(wanted: list[Entry], values: dict[str, Tensor]) -> dict[str, Tensor]:
            return to_theirs(wanted, to_ours([sources[entry.ours] for entry in wanted], values))

        def read(names: Iterable[str]) -> dict[str, Tensor]:
            chosen = set(names)
            wanted = [entry for entry in targets if entry.theirs in chosen]
            needed = dict.fromkeys(sources[entry.ours].theirs for entry in wanted)
            return arrange(wanted, self.tensors.read(needed))

        arranged = arrange(targets, {name: on_meta(one) for name, one in self.tensors.items()})
        return replace(self.tensors, headers={name: header(tensor) for name, tensor in arranged.items()}, read=read)

    @property
    def fingerprint(self) -> str:
        """That of the network in float32, whatever type it is loaded in; takes the memory of a chunk.

        Raises ValueError as `load` does.
        """
        if self.kind != ADAPTER:
            self.check()
        tensors = verified(self.arranged(NATIVE), torch.float32)

        def values() -> Iterator[tuple[str, Tensor]]:
            for group in chunks({name: tensors[name] for name in sorted(tensors)}):
                yield from sorted(tensors.read(group).items())

        return fingerprint_of(values())

    def without(self, **config: Any) -> "StoredNetwork":
        """The smaller network of a changed `config`, such as a text tower without its last layers."""
        smaller = replace(self, config=self.config | config)
        kept = {entry.theirs for entry in smaller.entries}
        return replace(smaller, tensors=self.tensors.renamed({name: name for name in self.tensors if name in kept}))


@dataclass(frozen=True)
class Contents(ContentsInfo):
    """What is found at a path, to load."""

    networks: Mapping[str, StoredNetwork]

    @property
    def denoising(self) -> StoredNetwork:
        """The denoising network. Raises ValueError where there is none."""
        if self.backbone is None:
            raise ValueError(
                f"{self.source} is {self.form} and holds no denoising network (it holds {', '.join(self.networks)}); "
                "give a model, a checkpoint or a run"
            )
        return self.networks[self.backbone]

    def network(self, kind: str) -> StoredNetwork:
        """Raises ValueError where there is none."""
        if kind not in self.networks:
            raise ValueError(
                f"{self.source} is {self.form} and holds no {kind} (it holds {', '.join(self.networks)}); "
                "give the file or folder of one"
            )
        return self.networks[kind]


def open_contents(path: str | Path, choices: Choices = Choices(), variant: str | None = None) -> Contents:  # noqa: B008 - a constant
    """Opens what `recognise` identifies at `path`, ready to be loaded; raises the same errors."""
    info = recognise(path, choices, variant)
    networks = {kind: StoredNetwork(**vars(network)) for kind, network in info.networks.items()}
    return Contents(**vars(info) | {"networks": networks})


def _fits(found: tuple[int, ...], expected: tuple[int, ...], form: str) -> bool:
    if form in ("1x1", "linear") and len(found) > 1 < len(expected):
        return (found[0], prod(found[1:])) == (expected[0], prod(expected[1:]))
    return found == expected
