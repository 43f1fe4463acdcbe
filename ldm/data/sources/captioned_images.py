"""Finds the images in a folder and their captions, in the common layouts."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path, PurePosixPath

from ldm.data.sources.caption_tables import ANNOTATIONS, METADATA, captions_in_tables
from ldm.data.sources.captions import Captions, Text
from ldm.data.sources.image import EXTENSIONS
from ldm.data.sources.masks import is_mask

PLACES = ("txt", "json", "caption")
MAX_REPEATS = 1000  # a larger number in a folder's name is a year or an identifier, not a repeat count
_KOHYA = re.compile(r"(\d{1,9})_.+")
_ABOUT = ("readme", "license", "copying", "notice", "dataset_infos")


class CaptionedImages:
    """The images with captions in `root` and its subfolders, sorted by path; `keys` are the paths relative to `root`.

    Captions are read from files beside an image (.txt, else .json, else .caption), from Hugging Face's metadata.jsonl,
    .csv or .parquet, or from COCO's annotations. `captions` selects other places, see `Captions`; rows of metadata
    count as JSON. An image without a caption gets `caption`, else the name of a kohya folder such as `10_sks dog`, else
    it is skipped. NAME.mask.png is a mask and skipped unless `masks` is true. Warns with the number of skipped files.
    Raises ValueError if there are no images or no captions.
    """

    def __init__(
        self, root: str | Path, captions: Sequence[str] = (), caption: str | None = None, masks: bool = False
    ) -> None:
        self.root, self.captions, self.caption = Path(root), Captions(tuple(captions), PLACES), caption
        files = _files(self.root)
        images = [key for key in files if _extension(key) in EXTENSIONS and not is_mask(key)]
        if not images:
            raise ValueError(f"{root} has no images: {_expected(files, self.root)}")
        self.listed = captions_in_tables(self.root, files, self.captions)
        self.beside = _extensions_beside(images, files, self.captions)
        self.kohya = all(1 <= _number(self._folder(key)) <= MAX_REPEATS for key in images)
        self.keys = [key for key in images if self._is_captioned(key)]
        if not self.keys:
            raise ValueError(
                f'no image in {root} has a caption: give one for all, such as "a photo of sks dog", as data.caption of '
                "train.py or --caption of ldm shards, or put "
                f"captions beside the images ({_stem(images[0])}{self.places}) or in {METADATA[0]}"
            )
        self.captions.check({*chain(*self.beside.values()), *(["json"] if self.listed else [])}, str(root))
        self._warn(images, [file for file in files if not (masks and is_mask(file))])

    @property
    def places(self) -> str:
        return " or ".join(f".{extension}" for extension in self.captions.extensions)

    def captions_of(self, key: str) -> list[str]:
        """Returns all captions of an image. Raises ValueError or OSError if they cannot be read."""
        listed, beside = self.listed.get(key, []), self.beside.get(key, [])
        if listed and not self.captions.places:
            return listed
        paths = [(extension, self.root / f"{_stem(key)}.{extension}") for extension in beside]
        texts = [Text(extension, path.read_bytes(), str(path)) for extension, path in paths]
        found = listed + self.captions.of_texts(texts)
        if not found and (fallback := self._fallback(key)) is not None:
            return [fallback]
        return self.captions.without_blank(found, str(self.root / key))

    def repeats(self, key: str) -> int:
        """Returns how often kohya's scripts repeat the image per epoch: the number before the _ in its folder's name.

        Returns 1 unless all images are in folders with such names.
        """
        return _number(self._folder(key)) if self.kohya else 1

    def _fallback(self, key: str) -> str | None:
        return self._folder(key).partition("_")[2] if self.caption is None and self.kohya else self.caption

    def _folder(self, key: str) -> str:
        """Returns the name of the top-level folder that contains the image, or of the root."""
        return key.partition("/")[0] if "/" in key else self.root.resolve().name

    def _is_captioned(self, key: str) -> bool:
        return bool(self.listed.get(key)) or key in self.beside or self._fallback(key) is not None

    def _warn(self, images: list[str], files: list[str]) -> None:
        without = sorted({*images} - {*self.keys})
        if without:
            warnings.warn(
                f"{len(without)} of {len(images)} images in {self.root} have no caption and are left out, such as "
                f"{without[0]}; data.caption=TEXT (ldm shards: --caption TEXT) gives them one",
                stacklevel=3,
            )
        stems = {_stem(key) for key in images}
        read = {*images, *(f"{stem}.{extension}" for stem in stems for extension in self.captions.extensions)}
        others = Counter(_extension(file) for file in files if file not in read and not _is_about(file))
        if others:
            kinds = ", ".join(f"{count} {f'.{e}' if e else 'without extension'}" for e, count in others.most_common(5))
            warnings.warn(
                f"left out of {self.root}, because they are neither images nor their captions: {kinds}"
                f"{' and others' if len(others) > 5 else ''}",
                stacklevel=3,
            )


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


def _expected(files: list[str], root: Path) -> str:
    """Returns a hint for a folder without image files, which may contain images in other formats."""
    present = {_extension(file) for file in files}
    if "parquet" in present:
        return f"run ldm shards {root} --out DIR to read its .parquet files, and train with data=shards data.shards=DIR"
    if "tar" in present:
        return f"train on its .tar files with data=shards data.shards={root}"
    return "expected .png, .jpg, .webp or other files that Pillow decodes"


def _number(folder: str) -> int:
    """Returns the number in a name such as `10_sks dog`, or 0 for other names."""
    match = _KOHYA.fullmatch(folder)
    return int(match[1]) if match else 0


def _extension(key: str) -> str:
    _, dot, extension = key.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot else ""


def _stem(key: str) -> str:
    return key.rpartition(".")[0]


def _is_about(file: str) -> bool:
    """Returns whether a file is not data, or is a table of captions."""
    path = PurePosixPath(file)
    return path.name in METADATA or ANNOTATIONS in path.parts or path.name.lower().startswith(_ABOUT)


def _extensions_beside(keys: list[str], files: list[str], captions: Captions) -> dict[str, list[str]]:
    """Maps each image with caption files of the same name to the extensions of those to read."""
    present = set(files)
    found = {key: [e for e in captions.extensions if f"{_stem(key)}.{e}" in present] for key in keys}
    return {key: list(captions.needed(extensions)) for key, extensions in found.items() if extensions}
