"""WebDataset tars of captioned pictures, read at random without unpacking them."""

import glob
import os
import re
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

from torch.utils.data import Dataset

from ldm.data.picture import EXTENSIONS, Framing, Sample, draw_and_index, read_caption
from ldm.data.shard_index import load_index
from ldm.image import WHITE

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Shards(Dataset[Sample]):
    """Samples KEY.png (jpg, jpeg, webp) with KEY.txt, or KEY.json with "caption", in the order of the tars.

    `urls` is a path, a pattern such as emoji-{00000..00003}.tar or emoji-*.tar, a folder, or a list of these.
    `shards[index]` or `shards[draw, index]`; a sample that lacks a member or cannot be read raises ValueError
    when it is asked for. A tar cut short is used as far as it goes, with a warning.
    """

    def __init__(
        self,
        urls: str | Path | Sequence[str | Path],
        size: int,
        background: tuple[int, int, int] = WHITE,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.framing = Framing(size, background, crop, flip, seed)
        self.paths = local_tars(urls)
        self.indices = [load_index(path) for path in self.paths]
        self.starts = [0, *accumulate(len(index.keys) for index in self.indices)]
        for path, index in zip(self.paths, self.indices, strict=True):
            if index.loss:
                warnings.warn(f"{path} is cut short or damaged: {index.loss}", stacklevel=2)
        if not any((index.spans[:, 0] >= 0).any() for index in self.indices):
            raise ValueError(f"{urls} holds no pictures: expected members ending in {', '.join(EXTENSIONS)}")

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        draw, position = draw_and_index(index, len(self))
        shard = self._shard(position)
        path, entries, row = self.paths[shard], self.indices[shard], position - self.starts[shard]
        key = entries.keys[row].decode()
        picture_at, picture_size, caption_at, caption_size = entries.spans[row].tolist()
        if picture_at < 0 or caption_at < 0:
            raise ValueError(f"{path} has no {'picture' if picture_at < 0 else '.txt or .json'} for {key}")
        # Opened anew each time: a descriptor would not survive pickling into a spawned worker, and costs 10 µs.
        with open(path, "rb") as file:
            picture = os.pread(file.fileno(), picture_size, picture_at)
            text = os.pread(file.fileno(), caption_size, caption_at)
        extension = str(entries.extensions[row])
        caption = read_caption(text, extension, f"{key}.{extension} in {path}")
        image = self.framing(picture, caption, f"{key} in {path}", position, draw)
        return {"image": image, "caption": caption, "key": key, "id": position}

    def key(self, index: int) -> str:
        shard = self._shard(index)
        return self.indices[shard].keys[index - self.starts[shard]].decode()

    def group(self, index: int) -> range:
        """The samples that may stand in for a bad one: those of its shard."""
        shard = self._shard(index)
        return range(self.starts[shard], self.starts[shard + 1])

    def _shard(self, position: int) -> int:
        return bisect_right(self.starts, position) - 1


def local_tars(urls: str | Path | Sequence[str | Path]) -> list[Path]:
    """Every tar that `urls` stands for; patterns and folders in the order of their names.

    Raises ValueError for what is not a local path, FileNotFoundError for what is not there.
    """
    if isinstance(urls, (str, Path)):
        return [path for text in _expand(str(urls)) for path in _tars_at(text)]
    if not urls:
        raise ValueError("no shards were given: expected a path, a pattern, a folder or a list of these")
    return [path for url in urls for path in local_tars(url)]


def _expand(pattern: str) -> list[str]:
    """x-{08..10}.tar → x-08.tar, x-09.tar, x-10.tar; several braces multiply."""
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise ValueError(f"{pattern} counts down: write {{{last}..{first}}}")
    numbers = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    return [text for n in numbers for text in _expand(pattern[: match.start()] + n + pattern[match.end() :])]


def _tars_at(text: str) -> list[Path]:
    path = Path(text)
    if re.match(r"pipe:|[a-z0-9+.-]+://", text, re.IGNORECASE):
        raise ValueError(f"{text} is not a local path: download the shards first and give their folder")
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.tar")) if path.is_dir() else [Path(p) for p in sorted(glob.glob(text))]
    if not found:
        expected = "no .tar lies in that folder" if path.is_dir() else "no such file, and no file matches it"
        raise FileNotFoundError(f"no shards at {text}: {expected}")
    return found
