"""Generates captioned images of one or two coloured shapes on a plain background.

Image, caption and layout are a pure function of (seed, index), so the data set is unlimited, needs no files, and every
sample can be reproduced. The split of a caption is fixed by a hash of its text.
"""

import colorsys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.sources.phrasing import TWINS, left_out, phrase, twins
from ldm.data.sources.scene import (
    BACKGROUNDS,
    HUES,
    RADII,
    RELATIONS,
    SHAPES,
    UNSEEN,
    Scene,
    Split,
    Thing,
    near_miss,
    random_scene,
)


@dataclass(frozen=True)
class Placed:
    """One object to render: centre and radius in pixels, colour as RGB in [0, 255]."""

    shape: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]


def place(scene: Scene, rng: np.random.Generator, hues: Mapping[str, float] = HUES) -> list[Placed]:
    """Returns positions, radii and exact colours that satisfy the scene, in a 64-pixel image."""
    centers = [rng.uniform(30, 34, 2)]
    if scene.relation:
        axis = np.array(RELATIONS[scene.relation])
        across = np.abs(axis[::-1])
        centers = [32 + sign * axis * rng.uniform(15.25, 15.75) + across * rng.uniform(-2, 2) for sign in (1, -1)]
    return [_placed(thing, x, y, rng, hues) for thing, (x, y) in zip(scene.things, centers, strict=True)]


def _placed(thing: Thing, x: float, y: float, rng: np.random.Generator, hues: Mapping[str, float] = HUES) -> Placed:
    radius = rng.uniform(*RADII[thing.size or str(rng.choice(list(RADII)))])
    hue = (hues[thing.color] + rng.uniform(-3, 3)) / 360
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.8, 1), rng.uniform(0.8, 1))
    return Placed(thing.shape, float(x), float(y), radius, (255 * red, 255 * green, 255 * blue))


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Returns the distance in pixels from the edge of the shape, negative inside.

    Coordinates are relative to the centre of the shape, with `u` to the right and `v` down.
    """
    if shape == "circle":
        return np.hypot(u, v) - radius
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.75 * radius) - 0.28 * radius
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.88 * radius
    if shape == "diamond":
        return (np.abs(u) + np.abs(v) - 1.2 * radius) * 0.5**0.5
    if shape == "triangle":
        return _folded_polygon(u, v - 0.3 * radius, 3, 1.3 * radius, 0.65 * radius)
    if shape == "star":
        return _folded_polygon(u, v - 0.1 * radius, 5, 1.3 * radius, 0.53 * radius)
    raise ValueError(f"unknown shape '{shape}'; expected one of {', '.join(SHAPES)}")


def _folded_polygon(u: np.ndarray, v: np.ndarray, points: int, outer: float, inner: float) -> np.ndarray:
    """Signed distance of a star or regular polygon with one point up.

    The plane is folded into half a sector, in which the edge is a single line.
    """
    half = np.pi / points
    angle = np.abs((np.arctan2(u, -v) + half) % (2 * half) - half)
    along, aside = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    edge_x, edge_y = inner * np.cos(half) - outer, inner * np.sin(half)
    return ((along - outer) * edge_y - aside * edge_x) / np.hypot(edge_x, edge_y)


Distance = Callable[[np.ndarray, np.ndarray, float], np.ndarray]  # (u, v, radius), see `signed_distance`
DISTANCES: Mapping[str, Distance] = {shape: partial(signed_distance, shape) for shape in SHAPES}


def render(
    placed: list[Placed], background: str | int, size: int = 64, shapes: Mapping[str, Distance] = DISTANCES
) -> np.ndarray:
    """Renders an image, uint8 (size, size, 3), with edges anti-aliased by the covered fraction of each pixel."""
    level = BACKGROUNDS[background] if isinstance(background, str) else background
    canvas = np.full((size, size, 3), level, np.float32)
    scale = size / 64
    for thing in placed:
        reach = 1.4 * thing.radius * scale + 1
        x, y = thing.x * scale, thing.y * scale
        left, right = max(0, int(x - reach)), min(size, int(x + reach) + 1)
        top, bottom = max(0, int(y - reach)), min(size, int(y + reach) + 1)
        u = np.arange(left, right, dtype=np.float32)[None, :] + 0.5 - x
        v = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - y
        distance = shapes[thing.shape](u, v, thing.radius * scale)
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        patch = canvas[top:bottom, left:right]
        patch += coverage * (np.array(thing.rgb, np.float32) - patch)
    return (canvas + 0.5).astype(np.uint8)


class Shapes(Dataset[dict[str, Any]]):
    """Captioned shapes without a limit; `length` only sets the size of an epoch.

    A sample is {"image": uint8 (3, size, size), "caption", "key", "id"}. The splits share no scene; "unseen" contains
    the scenes with a colour-shape pair of `UNSEEN`. With `variants` n > 1 each run of n images is a scene and n - 1
    near misses of it, which are hard negatives for contrastive training. The share `phrased` of the captions are freely
    phrased and omit attributes; the others are canonical.
    """

    def __init__(
        self,
        seed: int = 0,
        split: Split = "train",
        length: int = 1_000_000,
        size: int = 64,
        variants: int = 1,
        phrased: float = 0.0,
    ) -> None:
        if length < 1:
            raise ValueError(f"a shapes data set needs length >= 1, not {length}")
        if split not in get_args(Split):  # otherwise the search for a scene of the split would not end
            raise ValueError(f"split of a shapes data set is {split}, but must be one of {', '.join(get_args(Split))}")
        self.seed, self.split, self.length, self.size, self.variants = seed, split, length, size, variants
        self.phrased = phrased

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that determine every sample, besides the code."""
        settings = {"shapes": self.seed, "split": self.split, "size": self.size, "variants": self.variants}
        return settings | {"phrased": self.phrased}

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> tuple[Scene, list[Placed]]:
        """Returns the scene of image `index` and its objects as rendered."""
        scene, placed, _ = self.described(index)
        return scene, placed

    def described(self, index: int) -> tuple[Scene, list[Placed], str]:
        """Returns the scene of image `index`, its objects as rendered, and the caption."""
        group, member = divmod(index, self.variants)
        rng = self._random(group, 0, 0)
        while (scene := random_scene(rng)).split != self.split:
            continue
        words = self._random(group, 1, 0)
        phrased = bool(words.random() < self.phrased)
        said = left_out(words) if phrased else lambda scene: scene
        if phrased and words.random() < TWINS:
            scene = twins(scene)
        if member:
            rng, original = self._random(group, 0, member), scene
            while (scene := near_miss(original, rng)).split != self.split or (
                phrased and said(scene).describes_the_same(said(original))
            ):
                continue
        caption = phrase(said(scene), self._random(group, 1, 1 + member)) if phrased else scene.caption
        return scene, place(scene, rng), caption

    def _random(self, group: int, stream: int, member: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, group], counter=[0, 0, stream, member]))

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        if isinstance(index, tuple):  # (draw, index), but samples do not depend on the draw
            index = index[1]
        if not 0 <= index < self.length:
            raise IndexError(index)
        scene, placed, caption = self.described(index)
        image = torch.from_numpy(render(placed, str(scene.background), self.size)).permute(2, 0, 1).contiguous()
        return {"image": image, "caption": caption, "key": f"{self.split}-{self.seed}-{index}", "id": index}


class Crowds(Dataset[dict[str, Any]]):
    """Images of up to nine small things on a grid, with many edges per image, for training a first stage.

    Captions are empty, and no thing has a colour-shape pair of `UNSEEN`.
    """

    def __init__(self, seed: int = 0, length: int = 1_000_000, size: int = 64) -> None:
        self.seed, self.length, self.size = seed, length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        if isinstance(index, tuple):
            index = index[1]
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        pairs = [(color, shape) for color in HUES for shape in SHAPES if (color, shape) not in UNSEEN]
        centers = (np.stack(np.divmod(np.arange(9), 3), axis=1) + 0.5) * 64 / 3 + rng.uniform(-4, 4, (9, 2))
        placed = [
            _placed(Thing(*pairs[rng.integers(len(pairs))], size="small"), x, y, rng)
            for x, y in centers[rng.random(9) < 0.7]
        ]
        background = str(rng.choice(list(BACKGROUNDS)))
        image = torch.from_numpy(render(placed, background, self.size)).permute(2, 0, 1).contiguous()
        return {"image": image, "caption": "", "key": f"crowd-{self.seed}-{index}", "id": index}


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """Returns `count` different captions that are not in the training split, one in eight with an unseen pair."""
    sources = {split: Shapes(seed, split) for split in ("held_out", "unseen")}
    prompts: dict[str, None] = {}
    for index in range(sources["held_out"].length):
        if len(prompts) >= count:
            break
        prompts[sources["unseen" if len(prompts) % 8 == 7 else "held_out"].scene(index)[0].caption] = None
    return list(prompts)
