"""Writes checkpoints atomically, and verifies that a checkpoint is not corrupt before it is used."""

import pickle
import re
import warnings
import zipfile
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch

from ldm.files import atomic_write
from ldm.weights.storage.sharded import Join, join_shards, shard_files

LAST = "last.ckpt"
STEP = re.compile(r"step_(\d{8,})(\.ckpt|_[0-9a-f]{8}_rank_\d+\.shards)")  # matches the names of all other files
# An OSError is that of a broken link, of a folder with the name of a checkpoint, or of a disk that cannot be read.
UNUSABLE = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError)


def write(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Writes a temporary file, then renames it to `path`. The zip format stores a CRC-32 of each tensor."""
    atomic_write(path, lambda file: torch.save(checkpoint, file))


def read(path: str | Path, map_location: Any = "cpu", join: Join = torch.cat) -> dict[str, Any]:
    """Reads tensors and plain data only. Raises FileNotFoundError, or ValueError if the file is unusable.

    `join` combines the shards that several ranks wrote into one tensor.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: give a .ckpt file, or resume=auto")
    if problem := find_damage(path):
        raise ValueError(
            f"{path} is not a checkpoint, is truncated or corrupt, or contains more than plain data ({problem}): give "
            "another .ckpt file"
        )
    return dict(join_shards(Path(path), partial(torch.load, map_location=map_location, weights_only=True), join))


def read_settings(path: str | Path) -> dict[str, Any]:
    """Returns the settings that `SettingsCheck` stored, without reading tensors.

    They are empty for an older layout, and for a file that `read` refuses.
    """
    try:
        return dict(_mapped(path).get("settings", {}))
    except UNUSABLE:
        return {}


def find_damage(path: str | Path) -> str | None:
    """Returns why the file cannot be used, or None if all of its checksums match and its structure can be read."""
    try:
        _check(Path(path))
        for file in _files(Path(path))[1:]:
            _check(file)
    except UNUSABLE as error:
        return " ".join(str(error).split())
    return None


def is_complete(path: Path) -> bool:
    """Returns whether the file can be opened and no rank's file is missing, without reading the tensors."""
    try:
        return bool(_files(path))
    except UNUSABLE:
        return False


def _files(path: Path) -> list[Path]:
    return shard_files(path, _mapped(path))


def _mapped(path: str | Path) -> dict[str, Any]:
    """Returns the content of a checkpoint without reading its tensors. Raises one of UNUSABLE if it is none."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict):
        raise ValueError(f"it contains a {type(content).__name__} instead of a dict")
    return content


def _check(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():
            raise ValueError(f"the checksum of {broken} does not match")
    _mapped(path)


def step_of(file: Path) -> float:
    """Returns the step of a checkpoint by its name or, if it has another name, its content; inf if it has none."""
    if match := STEP.fullmatch(file.name):
        return int(match[1])
    try:
        return int(_mapped(file)["global_step"])
    except (*UNUSABLE, KeyError, TypeError):
        return inf


def written_by_run(folder: Path) -> list[Path]:
    """Returns the checkpoints in `folder` that have a name that a run writes."""
    return [file for file in folder.glob("*.ckpt") if file.name == LAST or STEP.fullmatch(file.name)]


def newest(folder: str | Path) -> Path | None:
    """Returns the intact checkpoint of the last step that a run wrote to `folder`, or None; warns about corrupt ones.

    The step decides, not the time of the file, which a copy, a restore or another machine's clock changes.

    Raises ValueError if all are corrupt or have other names.
    """
    folder, corrupt = Path(folder), set()
    files = written_by_run(folder)
    files.sort(key=lambda file: (step_of(file), file.name == LAST), reverse=True)
    for file in files:
        inode = file.stat().st_ino if file.exists() else None  # a broken link does not exist
        if inode in corrupt:  # last.ckpt and the newest step_N.ckpt are the same file
            continue
        if (problem := find_damage(file)) is None:
            return file
        corrupt |= {inode} - {None}
        warnings.warn(f"the checkpoint {file} is corrupt ({problem}): trying the previous one", stacklevel=2)
    if files:
        raise ValueError(
            f"every checkpoint in {folder} is corrupt: give resume=PATH, or another run_dir to start a new run"
        )
    if others := sorted(file for file in folder.glob("*.ckpt") if not file.name.startswith(".")):
        raise ValueError(f"no checkpoint in {folder} has a name that a run writes: give resume={others[0]}")
    return None
