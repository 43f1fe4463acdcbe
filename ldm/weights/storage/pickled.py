"""Reading what torch.save wrote, without ever running what lies in it."""

import pickle
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.weights.storage.sharded import join_shards
from ldm.weights.storage.tensors import Tensors
from ldm.weights.storage.values import in_memory

# Classes that well-known checkpoints name besides their tensors (SD 1.x keys its callbacks by class, and keeps
# their scores as numpy numbers). They are read as `Inert`, so nothing of theirs is imported or run.
HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)

# What the unpickler trips over in a file of something else.
GARBLED = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error)


class Inert:
    """Stands where a checkpoint names a class that we do not need."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def open_pickled(path: Path) -> Tensors:
    """The named tensors of a checkpoint, its "state_dict" if it has one, and its plain data as metadata."""
    saved = read_pickled(path)
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no named tensors; give a file of a model's weights")
    rest = {key: value for key, value in saved.items() if isinstance(value, str | int | dict) and value is not state}
    return in_memory(path, {str(name): value for name, value in state.items() if isinstance(value, Tensor)}, rest)


def read_pickled(path: Path) -> Any:
    """The tensors, mapped into memory, and plain data of a .ckpt, .bin, .pt or .pth; those of several ranks joined.

    Raises ValueError for a file that is none, is cut short, or holds code, which is not run.
    """
    zipped = zipfile.is_zipfile(path)
    load = partial(torch.load, map_location="cpu", weights_only=True, mmap=zipped)
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in HARMLESS]):
            return join_shards(path, load, skip=("optimizer_states", "ema_others"))
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, zipped)) from error
    except GARBLED as error:
        raise ValueError(f"{path} is no checkpoint, or is cut short; fetch or export it again") from error


def _refusal(path: Path, zipped: bool) -> str:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    foreign = sorted(set(names) - set(HARMLESS))
    named = f" ({', '.join(foreign[:3])})" if foreign else ""
    return (
        f"{path} is no checkpoint, or holds more than tensors and plain data{named}, which could run code: "
        "it was not opened; look for a .safetensors of the same model"
    )
