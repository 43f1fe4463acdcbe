"""Reads files written by torch.save, without ever running code in them."""

import errno
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

# Classes that well-known checkpoints name besides their tensors (SD 1.x keys its callbacks by class, and stores
# their scores as numpy numbers). They are read as `Inert`, so that none of them is imported or run.
HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)

# Errors that the unpickler raises for a file of another format, or a truncated one.
CORRUPT = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error)


class Inert:
    """Replaces objects of a class in `HARMLESS`, whose state is not needed."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def open_pickled(path: Path) -> Tensors:
    """Returns the named tensors of a checkpoint (its "state_dict" if it has one), with its plain data as metadata."""
    saved = read_pickled(path)
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no named tensors; give a file with the weights of a model")
    rest = {key: value for key, value in saved.items() if isinstance(value, str | int | dict) and value is not state}
    return in_memory(path, {str(name): value for name, value in state.items() if isinstance(value, Tensor)}, rest)


def read_pickled(path: Path) -> Any:
    """Reads the memory-mapped tensors and plain data of a .ckpt, .bin, .pt or .pth; joins the shards of several ranks.

    Raises ValueError for a file that is not a checkpoint, is truncated, or contains code, which is not run.
    """
    zipped = zipfile.is_zipfile(path)
    load = partial(torch.load, map_location="cpu", weights_only=True, mmap=zipped)
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in HARMLESS]):
            return join_shards(path, load, skip=("optimizer_states", "ema_others"))
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, zipped)) from error
    except (*CORRUPT, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # from mapping beyond the file's end
            raise
        raise ValueError(f"{path} is not a checkpoint, or is truncated; download or export it again") from error


def _refusal(path: Path, zipped: bool) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    except (*CORRUPT, pickle.UnpicklingError):
        names = []
    foreign = sorted(set(names) - set(HARMLESS))
    named = f" ({', '.join(foreign[:3])})" if foreign else ""
    return (
        f"{path} is not a checkpoint, or contains more than tensors and plain data{named}, which could run code: "
        "it was not opened; look for a .safetensors of the same model"
    )
