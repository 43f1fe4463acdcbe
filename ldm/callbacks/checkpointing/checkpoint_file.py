"""A checkpoint as a file: written whole or not at all, and known to be undamaged before it is used."""

import pickle
import re
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm.files import atomic_write
from ldm.weights.storage.sharded import Join, assembled, files

LAST = "last.ckpt"
STEP = re.compile(r"step_(\d{8,})(\.ckpt|_[0-9a-f]{8}_rank_\d+\.shards)")  # the names of all other files
UNUSABLE = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, FileNotFoundError)


def write(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Beside the old file, then in its place. Each tensor goes with its CRC-32, as in every zip archive."""
    atomic_write(path, lambda file: torch.save(checkpoint, file))


def read(path: str | Path, map_location: Any = "cpu", join: Join = torch.cat) -> dict[str, Any]:
    """Nothing but tensors and plain data. Raises FileNotFoundError or ValueError, in one sentence.

    `join` makes a tensor of the shards that several ranks wrote.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; give a .ckpt file, or resume=auto")
    if found := damage(path):
        raise ValueError(f"{path} is no checkpoint, is cut short or damaged, or holds more than plain data ({found})")
    return dict(assembled(Path(path), partial(torch.load, map_location=map_location, weights_only=True), join))


def damage(path: str | Path) -> str | None:
    """What keeps the file from being used: every checksum is computed, and its structure is read."""
    try:
        _check(Path(path))
        for file in _files(Path(path))[1:]:
            _check(file)
    except UNUSABLE as error:
        return " ".join(str(error).split())
    return None


def is_complete(path: Path) -> bool:
    """Whether it can be opened and no rank's file is missing; what is in them is not looked at."""
    try:
        return bool(_files(path))
    except UNUSABLE:
        return False


def _files(path: Path) -> list[Path]:
    return files(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def _check(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():
            raise ValueError(f"the checksum of {broken} does not hold")
    torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def newest(folder: str | Path) -> Path | None:
    """The newest undamaged checkpoint that a run wrote into `folder`, None if there is none; damaged ones are told.

    Raises ValueError where all are damaged, or under other names.
    """
    folder, spoiled = Path(folder), set()
    files = [file for file in folder.glob("*.ckpt") if file.name == LAST or STEP.fullmatch(file.name)]
    files.sort(key=lambda file: (file.stat().st_mtime_ns, file.name == LAST), reverse=True)
    for file in files:
        if file.stat().st_ino in spoiled:  # last.ckpt and the step's own name are one file
            continue
        if (found := damage(file)) is None:
            return file
        spoiled.add(file.stat().st_ino)
        warnings.warn(f"THE CHECKPOINT {file} IS DAMAGED ({found}): trying the one before it", stacklevel=2)
    if files:
        raise ValueError(f"every checkpoint in {folder} is damaged; give resume=PATH, or another run_dir to start anew")
    if others := sorted(file for file in folder.glob("*.ckpt") if not file.name.startswith(".")):
        raise ValueError(f"{folder} holds no checkpoint under a name that a run gives it; give resume={others[0]}")
    return None
