"""Reads a folder of images with captions, without copying it."""

import warnings
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from ldm.data.sources.buckets import bucket_sizes, nearest
from ldm.data.sources.captioned_images import CaptionedImages
from ldm.data.sources.captions import choose_caption
from ldm.data.sources.image import Framing, Sample, draw_and_index
from ldm.data.sources.masks import check_any, framed_mask
from ldm.data.sources.split import SplitHash
from ldm.image import WHITE, upright_size


class Folder(Dataset[Sample]):
    """The images with captions in `root`, see `CaptionedImages`; an image's path relative to `root` is its key.

    With `repeats`, the images in folders with names such as `10_sks dog` occur that many times, as in kohya's scripts.
    With `masks`, samples have a "mask", see `framed_mask`. If `bucketed`, images are cropped to the nearest of the
    `bucket_sizes` with sides in steps of `bucket_step`, instead of to a square. If an image has several captions, each
    draw gets one, keyed by the seed. Indexed as `folder[index]` or `folder[draw, index]`. An image or caption that
    cannot be read raises ValueError only on access.
    """

    split_hash: SplitHash = "mixed"

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
        repeats: bool = False,
        masks: bool = False,
        bucketed: bool = False,
        bucket_step: int = 64,
    ) -> None:
        sizes = tuple(bucket_sizes(size, bucket_step)) if bucketed else ()
        self.framing, self.masks = Framing(size, background, crop, flip, seed, sizes), masks
        self.images = CaptionedImages(root, captions, caption, masks)
        keys = self.images.keys
        self.keys = [key for key in keys for _ in range(self.images.repeats(key))] if repeats else keys
        if len(self.keys) > len(keys):
            warnings.warn(_message(self.images), stacklevel=2)
        if masks:
            check_any((self.images.root / key for key in keys), self.images.root)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        draw, position = draw_and_index(index, len(self))
        key = self.keys[position]
        caption = choose_caption(self.images.captions_of(key), self.framing.seed, position, draw)
        path = self.images.root / key
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
        return np.array([zlib.crc32(key.encode("utf-8", "surrogateescape")) for key in self.keys], np.uint32)

    @cached_property
    def buckets(self) -> np.ndarray:
        """The index of each image's size among the bucket sizes, (n,); all zero without buckets."""
        sizes = self.framing.buckets
        if not sizes:
            return np.zeros(len(self.keys), int)
        return np.array([sizes.index(nearest(*upright_size(self.images.root / key), sizes)) for key in self.keys])

    def group(self, index: int) -> range:
        """Returns the samples that may replace a bad one: all samples."""
        return range(len(self))


def _message(images: CaptionedImages) -> str:
    repeats = sorted({images.repeats(key) for key in images.keys})
    times = ", ".join(map(str, repeats))
    return (
        f"images in folders of {images.root} whose names begin with a number occur that many times per epoch "
        f"({times}); data.repeats=false uses each once"
    )
