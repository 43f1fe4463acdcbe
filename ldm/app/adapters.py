"""Offers adapters and textual inversions on a page: those of one folder, and files dropped on the page."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.drawing.added_files import AddedFiles, added_files
from ldm.files import atomic_write
from ldm.pipeline.loras import LoraFolder
from ldm.weights.adapters.recognise import has_adapter, has_embedding

KINDS = {"lora": has_adapter, "embedding": has_embedding}
Row = list[Any]  # the name of a LoRA and its weight
Offered = dict[str, dict[str, str]]  # "lora" or "embedding" → name → path


class AdapterFiles:
    """The files of `folder`, if there is one, and files dropped on the page, which are copied to `dropped`.

    Raises NotADirectoryError if `folder` is not a folder.
    """

    def __init__(self, folder: str | None, dropped: Path) -> None:
        self.folder = None if folder is None else LoraFolder(folder)
        self._dropped, self._names = dropped, {kind: dict[str, str]() for kind in KINDS}
        self._kinds: dict[tuple[Path, int], str | None] = {}

    def offered(self) -> Offered:
        """Returns the files that are currently in the folder."""
        found: Offered = {kind: {} for kind in KINDS}
        for name, file in ({} if self.folder is None else self.folder.files()).items():
            if (kind := self._kind(file)) is not None:
                found[kind][name] = str(file)
        return found

    def every(self) -> Offered:
        """Returns the files in the folder and all that were dropped on the page."""
        return {kind: names | self._names[kind] for kind, names in self.offered().items()}

    def add(self, upload: str) -> tuple[str, str]:
        """Copies a file that was dropped on the page, and returns its kind and its name on the page.

        Raises ValueError if it is neither an adapter nor a textual inversion.
        """
        path = Path(upload)
        kind = self._kind(path)
        if kind is None:
            raise ValueError(f"{path.name} is neither a LoRA nor a textual inversion; choose a file of one of these")
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()[:12]
        copy = self._dropped / digest / path.name  # the file's name may be the token of a textual inversion
        atomic_write(copy, lambda file: file.write(data))
        name = f"{path.name} ({digest[:6]})"
        self._names[kind][name] = str(copy)
        return kind, name

    def chosen(self, loras: Sequence[tuple[str, float]], embeddings: Sequence[str]) -> AddedFiles:
        """Returns the files with these names. Raises ValueError for a name that is not offered."""
        known = self.every()
        given = {
            "lora": [(_path(known["lora"], name), weight) for name, weight in loras],
            "embedding": [(_path(known["embedding"], name), None) for name in embeddings],
        }
        return added_files(given, {})

    def _kind(self, file: Path) -> str | None:
        key = file, file.stat().st_mtime_ns
        if key not in self._kinds:
            self._kinds[key] = next((kind for kind, is_kind in KINDS.items() if is_kind(file)), None)
        return self._kinds[key]


def rows(names: Sequence[str], weights: Mapping[str, float]) -> list[Row]:
    """Returns the table of LoRA files: a row for each name, with weight 0 where none is given."""
    return [[name, weights.get(name, 0.0)] for name in names]


def loras_of(table: Sequence[Row]) -> list[tuple[str, float]]:
    """Returns the names and weights of the rows whose weight is not 0. Raises ValueError for an invalid weight."""
    found = []
    for name, weight in table:
        try:
            value = float(weight or 0)
        except (TypeError, ValueError):
            value = float("nan")
        if not abs(value) < float("inf"):
            raise ValueError(f"the weight of {name} is {weight!r}, but must be a number, such as 0.8, or 0 for none")
        if value:
            found.append((str(name), value))
    return found


def _path(known: Mapping[str, str], name: str) -> str:
    if name not in known:
        raise ValueError(f"{name!r} is not among the files of this page; choose one from the list")
    return known[name]
