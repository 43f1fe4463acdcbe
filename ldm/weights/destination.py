"""Checks where a conversion may write: never into its source, and only over files that a conversion wrote."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ldm.ownership import Record, is_within, refuse
from ldm.weights.about import about_of
from ldm.weights.compvis.writer import COMPLETE, PART
from ldm.weights.info import ContentsInfo
from ldm.weights.kinds import ADAPTER, FOR_OTHERS, KINDS
from ldm.weights.storage.opening import open_tensors

NAMES = [f"{kind}.safetensors" for kind in KINDS]  # the file names in a folder in ldm's own format


def check_apart(path: Path, sources: Iterable[Path]) -> None:
    """Raises ValueError if the destination is one of the sources, contains one, or is in one."""
    for source in dict.fromkeys(sources):
        _check_apart(path, source)


def _check_apart(path: Path, source: Path) -> None:
    inside, contains = is_within(path, source), is_within(source, path)
    if inside or contains:
        relation = "is" if inside and contains else "is in" if inside else "contains"
        raise ValueError(f"the destination {path} {relation} the source {source}: give a destination outside of it")


def sources_of(contents: ContentsInfo) -> list[Path]:
    """Returns the paths that a model is read from: the given one, and the files of its networks."""
    return [contents.source, *(network.tensors.source for network in contents.networks.values())]


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Raises FileExistsError if `path` exists, unless `overwrite` is given and conversions wrote all of its files.

    A conversion wrote a file in a folder if the folder's record lists it with its current digest. Without a record,
    which earlier versions did not write, and for a single file, the metadata must say that ldm wrote it.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f"{path} already exists; give another name, or --overwrite")
    refuse(_foreign_at(path), "a conversion", "move it away, or give another name")


def _foreign_at(path: Path) -> list[Path]:
    """Returns the files at `path` that no conversion wrote; conversions never write links."""
    if path.is_dir() and not path.is_symlink():
        return _foreign_in(path)
    return [] if is_written_by_ldm(path) else [path]


def is_written_by_ldm(file: Path) -> bool:
    """Returns whether the metadata says that ldm wrote these weights; False for links and checkpoints of runs."""
    if file.is_symlink():
        return False
    try:
        kind = about_of(open_tensors(file)).get("kind")
    except (OSError, ValueError):
        return False
    return kind in (COMPLETE, PART, ADAPTER, *FOR_OTHERS) or (kind in KINDS and file.suffix == ".safetensors")


def _foreign_in(folder: Path) -> list[Path]:
    """Returns the files that no conversion wrote, and the empty folders, because conversions write none."""
    record, entries = Record(folder, "convert"), sorted(_entries(folder))
    folders = [path for path in entries if path.is_dir() and not path.is_symlink()]
    files = [path for path in entries if path not in folders and path != record.file]
    empty = [path for path in folders if not any(path in file.parents for file in files)]
    if record.file.is_file():
        return record.foreign(files) + empty
    return [
        file for file in files if file.parent != folder or file.name not in NAMES or not is_written_by_ldm(file)
    ] + empty


def _entries(folder: Path) -> Iterator[Path]:
    """Yields everything below the folder, without following links."""
    for root, folders, names in os.walk(folder):
        yield from (Path(root) / name for name in [*folders, *names])
