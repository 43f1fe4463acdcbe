"""The conditioning: all inputs of a denoising network besides the noisy latents and the time, as one value."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

CAPTION = ("text", "pooled")  # the fields that encode a caption
DROPPED = (*CAPTION, "labels")  # the fields that have an unconditional value
FIELDS = (*DROPPED, "sizes", "guidance")


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of b samples; a field that the model does not have is None.

    `text` (b, n, d) holds the text encoder's states, `pooled` (b, p) one vector per caption, `labels` (b,) class
    labels, `sizes` (b, k) the original height and width, crop offsets and target size in pixels (Podell et al. 2023)
    and `guidance` (b,) the scale that a guidance-distilled network reads (Meng et al. 2023). `hints` are image-shaped
    inputs (b, c, h, w) by the name of their purpose, such as "inpainting".
    """

    text: Tensor | None = None
    pooled: Tensor | None = None
    labels: Tensor | None = None
    sizes: Tensor | None = None
    guidance: Tensor | None = None
    hints: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Returns the number of samples; 0 if there is no conditioning."""
        return max((len(tensor) for _, tensor in self.named()), default=0)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the names and tensors of the fields that are set, and of the hints."""
        for name in FIELDS:
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor
        yield from self.hints.items()

    def get(self, name: str) -> Tensor:
        """Returns the field or hint of this name. Raises ValueError if it is not set."""
        named = dict(self.named())
        if name not in named:
            raise ValueError(f"the network reads {name}, but the conditioning has {', '.join(named) or 'no fields'}")
        return named[name]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Applies `change` to every tensor."""
        return _from(self.hints, {name: change(tensor) for name, tensor in self.named()})

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> "Conditioning":
        """Returns the selected samples, in the given order."""
        return self.map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """Moves the tensors to `device` and casts floating-point ones to `dtype`."""
        return self.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def repeated(self, times: int) -> "Conditioning":
        """Repeats the batch `times` times: sample i becomes samples i, b + i, 2b + i, …"""
        return self.map(lambda tensor: torch.cat([tensor] * times))

    def dropped(self, rows: Tensor, unconditional: "Conditioning") -> "Conditioning":
        """Replaces captions and labels by those of `unconditional` (one sample) where `rows` (b,) is True.

        Sizes, guidance scale and hints stay.
        """

        def choose(own: Tensor, empty: Tensor) -> Tensor:
            return torch.where(_column(rows, own), empty.to(own), own)

        return self._with(unconditional, DROPPED, choose)

    def lerp(self, other: "Conditioning", weight: Tensor) -> "Conditioning":
        """Interpolates captions linearly towards those of `other`, by the fraction `weight` (b,)."""
        return self._with(other, CAPTION, lambda a, b: torch.lerp(a, b, _column(weight, a).to(a.dtype)))

    def with_hint(self, name: str, hint: Tensor) -> "Conditioning":
        return replace(self, hints={**self.hints, name: hint})

    def _with(
        self, other: "Conditioning", names: Sequence[str], combine: Callable[[Tensor, Tensor], Tensor]
    ) -> "Conditioning":
        """Combines the named fields that are set with those of `other`, in which they must be set too."""
        combined: dict[str, Any] = {
            name: combine(tensor, getattr(other, name)) for name in names if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **combined)


def cat(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenates the samples of all parts.

    A hint that is the same tensor in all parts is kept once and applies to the samples of each part. Raises ValueError
    if the parts have different fields or shapes.
    """
    named = [dict(part.named()) for part in parts]
    shapes = [{name: tuple(tensor.shape[1:]) for name, tensor in part.items()} for part in named]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"conditionings of different fields or shapes cannot be batched: {shapes}")
    hints = parts[0].hints
    shared = {name for name in hints if all(part[name] is named[0][name] for part in named)}
    joined = {
        name: tensor if name in shared else torch.cat([part[name] for part in named])
        for name, tensor in named[0].items()
    }
    return _from(hints, joined)


def _from(hints: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Conditioning:
    """Builds a conditioning from tensors, of which those named in `hints` are hints."""
    fields: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if name not in hints}
    return Conditioning(**fields, hints={name: tensors[name] for name in hints})


def _column(rows: Tensor, like: Tensor) -> Tensor:
    """Reshapes (b,) to (b, 1, …) to broadcast with `like`."""
    return rows.view(-1, *[1] * (like.ndim - 1))


_pytree.register_dataclass(Conditioning)  # so that torch.compile and FSDP see the tensors in it
