"""Converts tensors between ldm's layout (`ours`) and the layout of another tool (`theirs`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.weights.keymaps import Entry


def to_theirs(entries: Sequence[Entry], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts ldm's tensors to another layout. All parts of a packed tensor must be in `state`."""
    parts: dict[str, list[Tensor]] = {}
    for entry in entries:
        parts.setdefault(entry.theirs, []).append(_theirs(state[entry.ours], entry.form))
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in parts.items()}


def to_ours(entries: Sequence[Entry], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the tensors of another layout to ldm's; they are views of the same memory where the bytes agree."""
    return {entry.ours: _ours(state[entry.theirs], entry.form) for entry in entries}


def _theirs(tensor: Tensor, form: str) -> Tensor:
    if form == "1x1" and tensor.ndim == 2:
        return tensor[:, :, None, None]
    return tensor.T if form == "T" else tensor


def _ours(tensor: Tensor, form: str) -> Tensor:
    if form in ("1x1", "linear") and tensor.ndim == 4:
        return tensor.flatten(1)
    if form == "T":
        return tensor.T.contiguous()
    if "/" in form:
        part, parts = map(int, form.split("/"))
        return tensor.chunk(parts)[part]
    return tensor
