"""Converts adapters and textual inversions from any layout to the layouts of kohya and diffusers."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.adapters.change import Change, LowRankChange
from ldm.files import check_writable
from ldm.weights.adapters.layouts import DIFFUSERS, KOHYA
from ldm.weights.adapters.reader import open_adapter
from ldm.weights.adapters.textual_inversion import read_embedding, write_embedding
from ldm.weights.adapters.writer import write_adapter
from ldm.weights.destination import check_apart, check_replaceable

IN_FOLDER = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"  # the file names that diffusers looks for


def convert_adapter(source: str, path: Path, to: str | None, dtype: torch.dtype | None, overwrite: bool) -> Path:
    """Writes the adapter at `source` to a file, or into a folder if `path` has no suffix, and returns the file.

    Raises ValueError if the layout cannot store the adapter, and FileExistsError as `check_replaceable` does.
    """
    file = open_adapter(source)
    target = _target(path, IN_FOLDER[0], file.source, overwrite)
    changes = {
        network: {name: _cast(change, dtype) for name, change in layers.items()}
        for network, layers in file.by_public_name().items()
    }
    write_adapter(target, changes, to or _layout(path), file.metadata)
    return target


def convert_embedding(source: str, path: Path, to: str | None, dtype: torch.dtype | None, overwrite: bool) -> Path:
    """Converts a textual inversion in the same way."""
    found = read_embedding(source)
    target = _target(path, IN_FOLDER[1], found.source, overwrite)
    cast = replace(found, vectors={name: _to(tensor, dtype) for name, tensor in found.vectors.items()})
    kept = {name: value for name, value in found.metadata.items() if isinstance(value, str)}
    dropped = ("ldm", "string_to_param", "string_to_token")
    write_embedding(target, cast, to or _layout(path), {name: kept[name] for name in kept if name not in dropped})
    return target


def _layout(path: Path) -> str:
    return KOHYA if path.suffix else DIFFUSERS


def _target(path: Path, name: str, source: Path, overwrite: bool) -> Path:
    target = path if path.suffix else path / name
    if target.suffix != ".safetensors":
        raise ValueError(f"{path} ends in {path.suffix}, but adapters are written to .safetensors, or into a folder")
    check_apart(target, [source])
    check_replaceable(target, overwrite)
    check_writable(target.parent)
    return target


def _cast(change: Change, dtype: torch.dtype | None) -> Change:
    if dtype is None or not isinstance(change, LowRankChange):
        return change
    magnitude = None if change.magnitude is None else change.magnitude.to(dtype)
    return replace(change, down=change.down.to(dtype), up=change.up.to(dtype), magnitude=magnitude)


def _to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)
