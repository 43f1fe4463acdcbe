"""Reads captioned images from WebDataset tars at random, without unpacking them."""

import glob
import re
import warnings
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from ldm.data.sources.buckets import Size
from ldm.data.sources.captions import Captions, Text, choose_caption
from ldm.data.sources.image import EXTENSIONS, Framing, Sample, draw_and_index
from ldm.data.sources.shard_index import load_index
from ldm.data.sources.split import SplitHash
from ldm.data.sources.storage import File, local_file, remote_files, summary
from ldm.image import WHITE
from ldm.progress import Progress

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Shards(Dataset[Sample]):
    """Samples KEY.png (jpg, jpeg, webp) with KEY.txt, or KEY.json with "caption", in the order of the tars.

    `urls` is a path, a pattern such as emoji-{00000..00003}.tar or emoji-*.tar, a folder, an address that fsspec
    opens, such as s3://bucket/folder, or a list of these. `captions` gives other places of captions, see `Captions`. If
    a sample has several captions, each draw gets one, keyed by the seed. Indexed as `shards[index]` or
    `shards[draw, index]`.

    A sample that lacks a member or cannot be read raises ValueError or OSError on access. A truncated tar is used up to
    the damage, with a warning. `others` are shards of the same data that other processes read. Raises ValueError if
    none of all shards has an image, or captions at one of the places.
    """

    split_hash: SplitHash = "mixed"

    def __init__(
        self,
        urls: str | Path | Sequence[str | Path | File],
        size: int,
        background: tuple[int, int, int] = WHITE,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        seed: int = 0,
        buckets: Sequence[Size] = (),
        captions: Sequence[str] = (),
        others: Sequence[File] = (),
    ) -> None:
        self.framing = Framing(size, background, crop, flip, seed, tuple(buckets))
        self.captions = Captions(tuple(captions))
        self.files = find_tars(urls)
        self.index = load_index(self.files, self.captions.extensions)
        for shard, loss in self.index.losses.items():
            warnings.warn(f"{self.files[shard]} is truncated or corrupt: {loss}", stacklevel=2)
        self._check(others)

    def _check(self, others: Sequence[File]) -> None:
        """Checks for images and captions. Indexes `others` one by one while these shards lack something."""
        present = self.index.present
        progress = Progress(len(others), "shards", "looking for images and captions: ")
        for file in others:
            if present[: None if self.captions.places else 1].all():
                break
            present = present | load_index([file], self.captions.extensions).present
            progress.step()
        image, *texts = present
        where = summary([*self.files, *others])
        if not image:
            raise ValueError(f"{where} has no images: expected members ending in {', '.join(EXTENSIONS[:4])}")
        self.captions.check({*compress(self.captions.extensions, texts)}, where)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        draw, position = draw_and_index(index, len(self))
        data, captions = self.read(position)
        caption = choose_caption(captions, self.framing.seed, position, draw)
        image = self.framing(data, caption, self.name(position), position, draw)
        return {"image": image, "caption": caption, "key": self.key(position), "id": position}

    def read(self, position: int) -> tuple[bytes, list[str]]:
        """Returns the bytes of an image file and all its captions."""
        file, key = self.files[self.index.shard(position)], self.key(position)
        image, needed = self.index.spans[position, 0].tolist(), self.index.texts(position, self.captions)
        if image[0] < 0 or not needed:
            missing = "image" if image[0] < 0 else " or ".join(f".{e}" for e in self.captions.extensions)
            raise ValueError(f"{file} has no {missing} for {key}")
        data, *contents = file.read(image, *(span for _, span in needed))
        texts = [Text(e, text, f"{key}.{e} in {file}") for (e, _), text in zip(needed, contents, strict=True)]
        return data, self.captions.read(texts)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "index": None}  # spawned workers map the index themselves

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, index=load_index(state["files"], state["captions"].extensions))

    def key(self, index: int) -> str:
        return self.index.key(index)

    def name(self, index: int) -> str:
        """Returns a human-readable name for messages."""
        return f"{self.key(index)} in {self.files[self.index.shard(index)]}"

    @property
    def hashes(self) -> np.ndarray:
        """The CRC-32 of every key, (n,) uint32."""
        return self.index.hashes

    def group(self, index: int) -> range:
        """Returns the samples that may replace a bad one: those of its shard."""
        return self.rows(self.index.shard(index))

    def rows(self, shard: int) -> range:
        """Returns the samples of a shard."""
        return range(int(self.index.starts[shard]), int(self.index.starts[shard + 1]))


def find_tars(urls: str | Path | File | Sequence[str | Path | File]) -> list[File]:
    """Returns every tar that `urls` refers to; those of a pattern or folder are sorted by name, a list keeps its order.

    Raises ValueError for an address that cannot be opened, and FileNotFoundError if there is no tar.
    """
    if isinstance(urls, File):
        return [urls]
    if isinstance(urls, (str, Path)):
        return [file for text in _expand(str(urls)) for file in _tars_at(text)]
    if not urls:
        raise ValueError("no shards were given: expected a path, a pattern, a folder or a list of these")
    return [file for url in urls for file in find_tars(url)]


def _expand(pattern: str) -> list[str]:
    """Expands x-{08..10}.tar to x-08.tar, x-09.tar and x-10.tar, and several braces to all combinations."""
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise ValueError(f"{pattern} counts down: write {{{last}..{first}}}")
    numbers = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    return [text for n in numbers for text in _expand(pattern[: match.start()] + n + pattern[match.end() :])]


def _tars_at(text: str) -> list[File]:
    if text.lower().startswith("pipe:"):
        raise ValueError(f"{text} would run a command, which is not allowed for data: give a path or an address")
    path = Path(text)
    if "://" in text:
        found = remote_files(text)
    elif path.is_file():
        found = [local_file(path)]
    else:
        found = [local_file(p) for p in sorted(glob.glob(f"{glob.escape(text)}/*.tar" if path.is_dir() else text))]
    if not found:
        reason = "no such file, and no file matches the pattern"
        if path.is_dir():
            reason = f"the folder contains no .tar; `ldm shards {text} --out DIR` makes shards of the images in it"
        raise FileNotFoundError(f"no shards at {text}: {reason}")
    return found
