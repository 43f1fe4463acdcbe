"""Reads a folder of images with captions in a `.txt` or `.json` beside each, or in Hugging Face's `metadata.jsonl`."""

import json
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from ldm.data.sources.buckets import bucket_sizes, nearest
from ldm.data.sources.captions import Captions, Text, choose_caption, decode_utf8
from ldm.data.sources.image import EXTENSIONS, Framing, Sample, draw_and_index
from ldm.data.sources.masks import check_any, framed_mask, is_mask
from ldm.image import WHITE, upright_size

METADATA = "metadata.jsonl"


class Folder(Dataset[Sample]):
    """The images in `root` and its subfolders, sorted by path; the path relative to `root` is the sample's key.

    `captions` gives other places of captions, see `Captions`; rows of metadata count as JSON. If an image has several
    captions, each draw gets one, keyed by the seed. Indexed as `folder[index]` or `folder[draw, index]`. Raises
    ValueError if the folder has no images or no captions. An image that has no caption or cannot be read raises
    ValueError only on access. `caption` is that of images without one. With `masks`, samples have a "mask", see
    `framed_mask`. If `bucketed`, images are cropped to the nearest of the
    `bucket_sizes` with sides in steps of `bucket_step`, instead of to a square.
    """

    def __init__(
        self,
        root: str | Path,
        size: int,
        background: tuple[int, int, int] = WHITE,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        seed: int = 0,
        captions: Sequence[str] = (),
        caption: str | None = None,
        masks: bool = False,
        bucketed: bool = False,
        bucket_step: int = 64,
    ) -> None:
        self.root, self.caption, self.masks = Path(root), caption, masks
        sizes = tuple(bucket_sizes(size, bucket_step)) if bucketed else ()
        self.framing = Framing(size, background, crop, flip, seed, sizes)
        self.captions = Captions(tuple(captions))
        self.places = " or ".join(f".{extension}" for extension in self.captions.extensions)
        files = _files(self.root)
        self.keys = [key for key in files if key.lower().endswith(tuple(f".{e}" for e in EXTENSIONS))]
        self.keys = [key for key in self.keys if not is_mask(key)]
        if not self.keys:
            raise ValueError(f"{root} has no images: expected files ending in {', '.join(EXTENSIONS)}")
        self.listed = _captions_in_metadata(self.root, files, self.captions)
        self.beside = _extensions_beside(self.keys, files, self.captions)
        if caption is None and not any(self.listed.get(key) or key in self.beside for key in self.keys):
            raise ValueError(
                f"no image in {root} has a caption: put captions beside the images ({_stem(self.keys[0])}{self.places})"
                f" or in {METADATA}, or give data.caption, one caption for all"
            )
        self.captions.check({*chain(*self.beside.values()), *(["json"] if self.listed else [])}, str(root))
        if masks:
            check_any((self.root / key for key in self.keys), self.root)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        draw, position = draw_and_index(index, len(self))
        key = self.keys[position]
        caption = choose_caption(self._captions(key), self.framing.seed, position, draw)
        path = self.root / key
        image = self.framing(path.read_bytes(), caption, str(path), position, draw)
        sample: Sample = {"image": image, "caption": caption, "key": key, "id": position}
        if self.masks:
            sample["mask"] = framed_mask(path, image.shape, self.framing, caption, position, draw)
        return sample

    def key(self, index: int) -> str:
        return self.keys[index]

    @property
    def hashes(self) -> np.ndarray:
        """The CRC-32 of every key, (n,) uint32."""
        return np.array([zlib.crc32(key.encode()) for key in self.keys], np.uint32)

    @cached_property
    def buckets(self) -> np.ndarray:
        """The index of each image's size among the bucket sizes, (n,); all zero without buckets."""
        sizes = self.framing.buckets
        if not sizes:
            return np.zeros(len(self.keys), int)
        return np.array([sizes.index(nearest(*upright_size(self.root / key), sizes)) for key in self.keys])

    def group(self, index: int) -> range:
        """Returns the samples that may replace a bad one: all samples."""
        return range(len(self))

    def _captions(self, key: str) -> list[str]:
        listed, beside = self.listed.get(key, []), self.beside.get(key, [])
        if not listed and not beside and self.caption is not None:
            return [self.caption]
        if not listed and not beside:
            raise ValueError(f"{self.root / key} has no caption: no {self.places} beside it and no row in {METADATA}")
        if listed and not self.captions.places:
            return listed
        paths = [(extension, self.root / f"{_stem(key)}.{extension}") for extension in beside]
        texts = [Text(extension, path.read_bytes(), str(path)) for extension, path in paths]
        return self.captions.without_blank(listed + self.captions.of_texts(texts), str(self.root / key))


def _files(root: Path) -> list[str]:
    """Returns the sorted relative paths of all files in `root` and its subfolders that are not hidden."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give the folder of the images")
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        found += [(below / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _stem(key: str) -> str:
    return key.rpartition(".")[0]


def _extensions_beside(keys: list[str], files: list[str], captions: Captions) -> dict[str, list[str]]:
    """Maps each image that has caption files of the same name beside it to the extensions of those to read."""
    present = set(files)
    found = {key: [e for e in captions.extensions if f"{_stem(key)}.{e}" in present] for key in keys}
    return {key: list(captions.needed(extensions)) for key, extensions in found.items() if extensions}


def _captions_in_metadata(root: Path, files: list[str], captions: Captions) -> dict[str, list[str]]:
    """Maps images to their captions in all `metadata.jsonl`, whose file names are relative to their own folder."""
    found: dict[str, list[str]] = {}
    for metadata in (file for file in files if Path(file).name == METADATA):
        for key, listed in _rows(root / metadata, captions):
            found.setdefault(os.path.normpath(Path(metadata).parent / key), []).extend(listed)
    absent = sorted(found.keys() - set(files))
    if absent:
        warnings.warn(
            f"{METADATA} in {root} names {len(absent)} files that do not exist, such as {absent[0]}", stacklevel=3
        )
    return found


def _rows(path: Path, captions: Captions) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(decode_utf8(path.read_bytes(), str(path)).split("\n"), 1):
        where = f"line {number} of {path}"
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if row is None:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f'{where} has no "file_name"')
        listed = captions.of_row(row)
        yield row["file_name"], listed if captions.places else captions.without_blank(listed, where)
