"""Keeps commands from overwriting their input, and any file that they did not write or that was changed since."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ldm.files import write_bytes, write_json


def is_within(path: Path, place: Path) -> bool:
    """Returns whether `path`, which need not exist, is `place` or below it; links, letter case and `..` are resolved.

    False if nothing exists at `place`.
    """
    candidates = _self_and_parents(path.expanduser())
    return place.exists() and any(candidate.exists() and candidate.samefile(place) for candidate in candidates)


def _self_and_parents(path: Path) -> Iterable[Path]:
    """Returns the path itself, the target of its link, and all folders above either."""
    target, entry = path.resolve(), path.parent.resolve() / path.name
    return dict.fromkeys([target, *target.parents, *(() if path.name == ".." else (entry, *entry.parents))])


def check_outside(path: Path, place: str | Path, output: str, given: str) -> None:
    """Raises ValueError if `path`, given by the option `output`, is the input `place` or is in it."""
    if is_within(path, Path(place)):
        raise ValueError(
            f"{output} {path} is in the {given} {place}, so that its files would be read as input: give "
            f"{output} a path outside of it"
        )


def refuse(foreign: list[Path], written_by: str, remedy: str) -> None:
    """Raises a FileExistsError that names the first of the `foreign` files, if there are any."""
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise FileExistsError(
            f"{foreign[0]}{more} was not written by {written_by}, or was changed since, and is not replaced: {remedy}"
        )


class Record:
    """Records the SHA-256 of the files that a command wrote into `folder`, in a hidden file there, by relative path."""

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.command = folder, command
        self.file = folder / f".ldm_{command}.json"

    def read(self) -> dict[str, list[str]]:
        """Returns the digests that each file may have; empty if the record is missing or corrupt."""
        try:
            files = json.loads(self.file.read_text())["files"]
            return {str(name): [str(digest) for digest in digests] for name, digests in files.items()}
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def foreign(self, paths: Iterable[Path]) -> list[Path]:
        """Returns those of `paths`, all below the folder, that exist but are not files as the command wrote them."""
        known = self.read()
        return [path for path in paths if os.path.lexists(path) and not self._holds(path, known)]

    def _holds(self, path: Path, known: Mapping[str, list[str]]) -> bool:
        digests = known.get(path.relative_to(self.folder).as_posix(), [])
        return bool(digests) and path.is_file() and not path.is_symlink() and digest(path) in digests

    def check(self, names: Iterable[str]) -> None:
        """Raises FileExistsError if one of the names exists and was not written by the command."""
        foreign = self.foreign(self.folder / name for name in names)
        refuse(foreign, f"ldm {self.command}", "move it away, or give another folder")

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Writes files by name. Raises FileExistsError as `check` does.

        The record is written first and lists the old content too, so that files stay known if the process is killed.
        """
        self.check(contents)
        paths = {self.folder / name: data for name, data in contents.items()}
        digests = {path: [hashlib.sha256(data).hexdigest()] for path, data in paths.items()}
        for path in digests:
            digests[path] += [digest(path)] if path.exists() else []
        self._save(self.read() | self._by_name(digests))
        for path, data in paths.items():
            write_bytes(path, data)

    def write_all(self) -> None:
        """Records every file that is below the folder now."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        self._save(self._by_name({path: [digest(path)] for path in files}))

    def _by_name(self, digests: Mapping[Path, list[str]]) -> dict[str, list[str]]:
        return {path.relative_to(self.folder).as_posix(): found for path, found in digests.items()}

    def _save(self, digests: Mapping[str, list[str]]) -> None:
        write_json(self.file, {"files": digests})


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
