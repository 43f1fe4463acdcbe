"""The inputs of a pipeline call that may differ from image to image."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.image import BLACK, WHITE, to_pil, to_rgb

MAX_SEED = 2**63 - 1
BACKGROUNDS = {"image": WHITE, "mask": BLACK}  # for transparent pixels, which a mask does not repaint

T = TypeVar("T")
OneOrEach: TypeAlias = T | Sequence[T]  # one value for all images, or one for each
ImageInput = Image.Image | Tensor  # of any mode, or uint8 (3, h, w); a mask is (1, h, w) and may be bool


@dataclass(frozen=True)
class Between(Generic[T]):
    """Interpolates between two prompts or two seeds: `share` 0 is the first, 1 the second."""

    first: T
    second: T
    share: float

    def __post_init__(self) -> None:
        if not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise ValueError(f"the share between two prompts or seeds is {self.share!r}, but must be from 0 to 1")


def endpoints(values: Sequence[T | Between[T]]) -> tuple[list[T], list[T], list[float]]:
    """Returns first values, second values and shares; a plain value is both of its endpoints."""
    pairs = [value if isinstance(value, Between) else Between(value, value, 0.0) for value in values]
    return [pair.first for pair in pairs], [pair.second for pair in pairs], [pair.share for pair in pairs]


def prompt_texts(requests: "Sequence[ImageRequest]") -> list[str]:
    """Returns each distinct prompt and negative prompt once."""
    first, second, _ = endpoints([request.prompt for request in requests])
    return list(dict.fromkeys(first + second + [request.negative for request in requests]))


@dataclass(frozen=True)
class ImageRequest:
    """The inputs of one image. Raises ValueError for values of the wrong type or out of range."""

    prompt: str | Between[str]
    negative: str
    seed: int | Between[int]
    guidance: float
    image: Image.Image | None = None
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        prompts, seeds = (first + second for first, second, _ in (endpoints([self.prompt]), endpoints([self.seed])))
        for name, texts in (("prompt", prompts), ("negative", [self.negative])):
            for text in texts:
                if not isinstance(text, str):
                    raise ValueError(f"a {name} is {text!r}, which is not text: give a str or a list of str")
                if not _is_unicode(text):
                    raise ValueError(
                        f"a {name} is {text!r}, which holds half of a surrogate pair: give whole characters"
                    )
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
                raise ValueError(f"a seed is {seed!r}, but must be an integer between 0 and {MAX_SEED}")
        if not isinstance(self.guidance, int | float) or not isfinite(self.guidance):
            raise ValueError(f"a guidance scale is {self.guidance!r}, but must be a finite number")
        if self.mask is not None and self.image is None:
            raise ValueError("a mask was given without an image: give the image that it masks")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def image_requests(
    prompts: OneOrEach[str | Between[str]],
    negative: OneOrEach[str],
    seeds: OneOrEach[int | Between[int]] | None,
    guidance: OneOrEach[float],
    image: OneOrEach[ImageInput] | Tensor | None = None,
    mask: OneOrEach[ImageInput] | Tensor | None = None,
) -> list[ImageRequest]:
    """Returns one request per image. A value that is not a list applies to all images; seeds default to 0, 1, ….

    Raises ValueError for lists of different lengths, and for an image or mask of the wrong type.
    """
    columns = {
        "prompts": _as_list(prompts),
        "negatives": _as_list(negative),
        "seeds": _as_list(seeds),
        "guidance scales": _as_list(guidance),
        "images": _images("image", image, 3),
        "masks": _images("mask", mask, 1),
    }
    lengths = {name: len(column) for name, column in columns.items() if isinstance(column, list)}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        counts = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(
            f"there are {counts}: give lists of equal length, at least 1, or a single value for all images"
        )
    count = next(iter(lengths.values()), 1)
    if seeds is None:
        columns["seeds"] = list(range(count))
    rows = (column if isinstance(column, list) else [column] * count for column in columns.values())
    return [ImageRequest(*row) for row in zip(*rows, strict=True)]


def _as_list(given: object) -> Any:
    """Returns a sequence as a list, and anything else, including text, unchanged."""
    given = as_python(given)
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        return given
    return [as_python(value) for value in given]


def as_python(value: Any) -> Any:
    """Converts numbers and arrays of NumPy and torch to Python numbers and lists; returns anything else as it is."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value


def _images(name: str, given: object, channels: int) -> Any:
    if given is None:
        return None
    if isinstance(given, Tensor) and given.ndim == 4:
        given = list(given.unbind())
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return [_image(name, value, channels) for value in given]
    return _image(name, given, channels)


def _image(name: str, given: object, channels: int) -> Image.Image:
    if isinstance(given, Image.Image):
        try:
            return to_rgb(given, BACKGROUNDS[name])
        except (OSError, ValueError) as error:
            raise ValueError(f"the {name} cannot be used: {error}") from error
    if isinstance(given, Tensor) and given.ndim == 3 and len(given) == channels and given.numel():
        if given.dtype == torch.bool:
            given = given.to(torch.uint8) * 255
        if given.dtype == torch.uint8:
            return to_pil(given.expand(3, -1, -1))[0]
    if isinstance(given, Tensor | np.ndarray):
        kind = "tensor" if isinstance(given, Tensor) else "NumPy array"
        value = f"a {given.dtype} {kind} of shape {tuple(given.shape)}"
    else:
        value = repr(given)
    raise ValueError(f"the {name} is {value}, but must be a PIL image or a uint8 tensor ({channels}, h, w)")
