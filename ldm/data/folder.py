"""A folder of pictures with captions: `.txt` or `.json` beside each, or `metadata.jsonl` as Hugging Face has it."""

import json
import os
import warnings
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from ldm.data.picture import EXTENSIONS, Framing, Sample, caption_in, draw_and_index, read_caption
from ldm.image import WHITE

METADATA = "metadata.jsonl"


class Folder(Dataset[Sample]):
    """Pictures anywhere below `root`, in the order of their paths; the path below `root` is the sample's key.

    `folder[index]` or `folder[draw, index]`. A picture without a caption, or that cannot be read, raises
    ValueError when it is asked for; a folder without pictures or without any caption raises it at once.
    """

    def __init__(
        self,
        root: str | Path,
        size: int,
        background: tuple[int, int, int] = WHITE,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.root = Path(root)
        self.framing = Framing(size, background, crop, flip, seed)
        files = _files(self.root)
        self.keys = [key for key in files if key.lower().endswith(tuple(f".{e}" for e in EXTENSIONS))]
        if not self.keys:
            raise ValueError(f"{root} holds no pictures: expected files ending in {', '.join(EXTENSIONS)}")
        self.listed = _listed(self.root, files)
        self.beside = _beside(self.keys, files)
        if not any(key in self.listed or key in self.beside for key in self.keys):
            raise ValueError(
                f"no picture in {root} has a caption: put it beside the picture ({_stem(self.keys[0])}.txt or .json) "
                f"or in {METADATA}"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        draw, position = draw_and_index(index, len(self))
        key = self.keys[position]
        caption = self._caption(key)
        path = self.root / key
        image = self.framing(path.read_bytes(), caption, str(path), position, draw)
        return {"image": image, "caption": caption, "key": key, "id": position}

    def key(self, index: int) -> str:
        return self.keys[index]

    @property
    def hashes(self) -> np.ndarray:
        """The CRC-32 of every key, (n,) uint32."""
        return np.array([zlib.crc32(key.encode()) for key in self.keys], np.uint32)

    def group(self, index: int) -> range:
        """The samples that may stand in for a bad one: all."""
        return range(len(self))

    def _caption(self, key: str) -> str:
        if key in self.listed:
            return self.listed[key]
        if key not in self.beside:
            raise ValueError(f"{self.root / key} has no caption: no .txt or .json beside it, no row in {METADATA}")
        path = self.root / self.beside[key]
        return read_caption(path.read_bytes(), path.suffix[1:], str(path))


def _files(root: Path) -> list[str]:
    """Every file below `root` that is not hidden, as a sorted path relative to it."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give the folder that holds the pictures")
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        found += [(below / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _stem(key: str) -> str:
    return key.rpartition(".")[0]


def _beside(keys: list[str], files: list[str]) -> dict[str, str]:
    """Picture → caption file of the same name; `.txt` wins over `.json`."""
    there = set(files)
    candidates = {key: (f"{_stem(key)}.txt", f"{_stem(key)}.json") for key in keys}
    return {key: next(n for n in names if n in there) for key, names in candidates.items() if there & {*names}}


def _listed(root: Path, files: list[str]) -> dict[str, str]:
    """Picture → caption, from every `metadata.jsonl`, whose file names are relative to its own folder."""
    captions: dict[str, str] = {}
    for metadata in (file for file in files if Path(file).name == METADATA):
        for key, caption in _rows(root / metadata):
            captions[os.path.normpath(Path(metadata).parent / key)] = caption
    absent = sorted(captions.keys() - set(files))
    if absent:
        warnings.warn(
            f"{METADATA} in {root} names {len(absent)} files that are not there, as {absent[0]}", stacklevel=3
        )
    return captions


def _rows(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read; save it as UTF-8") from error
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"line {number} of {path}"
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if row is None:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f'{where} has no "file_name"')
        rows.append((row["file_name"], caption_in(row, where)))
    return rows
