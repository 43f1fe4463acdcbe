"""What may differ from picture to picture of one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ldm.image import to_pil

MAX_SEED = 2**63 - 1

T = TypeVar("T")
OneOrEach: TypeAlias = T | Sequence[T]  # one for all pictures, or one for each
ImageInput = Image.Image | Tensor  # RGB, or uint8 (3, h, w); a mask is (1, h, w) and may be bool


@dataclass(frozen=True)
class Between(Generic[T]):
    """What lies a share of the way, from 0 to 1, between two prompts or two seeds."""

    first: T
    second: T
    share: float

    def __post_init__(self) -> None:
        if not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise ValueError(f"the share between two prompts or seeds is {self.share!r}, but must lie from 0 to 1")


def ends(values: Sequence[T | Between[T]]) -> tuple[list[T], list[T], list[float]]:
    """Firsts, seconds and shares; a plain value is both its ends."""
    pairs = [one if isinstance(one, Between) else Between(one, one, 0.0) for one in values]
    return [one.first for one in pairs], [one.second for one in pairs], [one.share for one in pairs]


@dataclass(frozen=True)
class ImageRequest:
    """Raises ValueError for what is of the wrong type or out of range."""

    prompt: str | Between[str]
    negative: str
    seed: int | Between[int]
    guidance: float
    image: Image.Image | None = None
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        prompts, seeds = (first + second for first, second, _ in (ends([self.prompt]), ends([self.seed])))
        for name, texts in (("prompt", prompts), ("negative", [self.negative])):
            for text in texts:
                if not isinstance(text, str):
                    raise ValueError(f"a {name} is {text!r}, which is no text: give a str, or a list of them")
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
                raise ValueError(f"a seed is {seed!r}, but must be a whole number between 0 and {MAX_SEED}")
        if not isinstance(self.guidance, int | float) or not isfinite(self.guidance):
            raise ValueError(f"a guidance scale is {self.guidance!r}, but must be a finite number")
        if self.mask is not None and self.image is None:
            raise ValueError("a mask was given without an image: give the image of which it is a mask")


def image_requests(
    prompts: OneOrEach[str | Between[str]],
    negative: OneOrEach[str],
    seeds: OneOrEach[int | Between[int]] | None,
    guidance: OneOrEach[float],
    image: OneOrEach[ImageInput] | Tensor | None = None,
    mask: OneOrEach[ImageInput] | Tensor | None = None,
) -> list[ImageRequest]:
    """One a picture. What is no list goes for all of them; seeds are 0, 1, … by default.

    Raises ValueError for lists of several lengths, and for an image or mask that is none.
    """
    columns = {
        "prompts": _listed(prompts),
        "negatives": _listed(negative),
        "seeds": _listed(seeds),
        "guidance scales": _listed(guidance),
        "images": _pictures("image", image, 3),
        "masks": _pictures("mask", mask, 1),
    }
    lengths = {name: len(column) for name, column in columns.items() if isinstance(column, list)}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        told = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"there are {told}: give as many of each, at least 1, or one that is no list, for all")
    count = next(iter(lengths.values()), 1)
    if seeds is None:
        columns["seeds"] = list(range(count))
    rows = (column if isinstance(column, list) else [column] * count for column in columns.values())
    return [ImageRequest(*row) for row in zip(*rows, strict=True)]


def _listed(given: object) -> Any:
    """A sequence as a list; what is one thing, as text is, as it is."""
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else given


def _pictures(name: str, given: object, channels: int) -> Any:
    if given is None:
        return None
    if isinstance(given, Tensor) and given.ndim == 4:
        given = list(given.unbind())
    found = _listed(given)
    return (
        [_picture(name, one, channels) for one in found] if isinstance(found, list) else _picture(name, found, channels)
    )


def _picture(name: str, given: object, channels: int) -> Image.Image:
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, Tensor) and given.ndim == 3 and len(given) == channels and given.numel():
        if given.dtype == torch.bool:
            given = given.to(torch.uint8) * 255
        if given.dtype == torch.uint8:
            return to_pil(given.expand(3, -1, -1))[0]
    told = f"a {given.dtype} tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
    raise ValueError(f"the {name} is {told}, but must be a PIL picture or a uint8 tensor ({channels}, h, w)")
