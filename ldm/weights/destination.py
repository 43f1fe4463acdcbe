"""Where a conversion may write: beside its source, and over nothing but what a conversion wrote."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ldm.ownership import Record, is_within, refuse
from ldm.weights.about import about_of
from ldm.weights.compvis.writer import PART, WHOLE
from ldm.weights.found import Found
from ldm.weights.kinds import ADAPTER, FOR_OTHERS, KINDS
from ldm.weights.storage.opening import open_tensors

NAMES = [f"{kind}.safetensors" for kind in KINDS]  # of the files in a folder of ldm's own format


def check_apart(path: Path, sources: Iterable[Path]) -> None:
    """Raises ValueError where the destination is one of the sources, contains it, or lies in it."""
    for source in dict.fromkeys(sources):
        _check_apart(path, source)


def _check_apart(path: Path, source: Path) -> None:
    inside, contains = is_within(path, source), is_within(source, path)
    if inside or contains:
        how = "is" if inside and contains else "lies in" if inside else "contains"
        raise ValueError(f"the destination {path} {how} the source {source}: give a destination apart from it")


def sources_of(contents: Found) -> list[Path]:
    """All that a model is read from: what was given, and the files of its networks."""
    return [contents.source, *(network.tensors.source for network in contents.networks.values())]


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Raises FileExistsError for what is at `path`, unless `overwrite` is given and conversions wrote all of it.

    A file in a folder is a conversion's if the folder's record lists it with the bytes that it has. Without a record,
    as former versions left none, and for a single file, it is one if it carries ldm's mark.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f"{path} is there already; give another name, or --overwrite")
    refuse(_foreign_at(path), "a conversion", "move it away, or give another name")


def _foreign_at(path: Path) -> list[Path]:
    """What no conversion wrote of a file, a folder, or a link, which none writes."""
    if path.is_dir() and not path.is_symlink():
        return _foreign_in(path)
    return [] if is_marked(path) else [path]


def is_marked(file: Path) -> bool:
    """Whether the metadata of a file say that ldm wrote these weights; False for links and for a run's checkpoints."""
    if file.is_symlink():
        return False
    try:
        kind = about_of(open_tensors(file)).get("kind")
    except (OSError, ValueError):
        return False
    return kind in (WHOLE, PART, ADAPTER, *FOR_OTHERS) or (kind in KINDS and file.suffix == ".safetensors")


def _foreign_in(folder: Path) -> list[Path]:
    """Files that no conversion wrote, and empty folders, since none leaves those."""
    record, entries = Record(folder, "convert"), sorted(_entries(folder))
    folders = [path for path in entries if path.is_dir() and not path.is_symlink()]
    files = [path for path in entries if path not in folders and path != record.file]
    empty = [path for path in folders if not any(path in file.parents for file in files)]
    if record.file.is_file():
        return record.foreign(files) + empty
    return [file for file in files if file.parent != folder or file.name not in NAMES or not is_marked(file)] + empty


def _entries(folder: Path) -> Iterator[Path]:
    """Everything below the folder; links are not followed."""
    for root, folders, names in os.walk(folder):
        yield from (Path(root) / name for name in [*folders, *names])
