"""Does a picture of shapes show what its caption says? Checked by analysis through synthesis, with no trained network.

Segment the picture into things, fit each of the six shapes to every thing, name colour and size, draw the picture that
was understood and compare: what the drawing does not explain (blobs, ghosts, halves, stray marks) is the misfit.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from itertools import permutations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from ldm.data.shapes import BACKGROUNDS, HUES, RADII, RELATIONS, SHAPES, Scene, Thing, parse, signed_distance

SIDE = (
    64  # pixels of a picture's side: radii and tolerances below are in such pixels and in levels of [0, 255]
)
WINDOW = 40  # side of the window that is cut out around a thing; the largest spans 32
MOST_THINGS, FEWEST_PIXELS = 3, 16  # a picture's largest components are looked at; smaller ones are specks
FAINT = 40.0  # levels; the palette's weakest colour lies 100 from gray
BACKGROUND_TOLERANCE = 24.0
SATURATION, VALUE = 0.5, 0.55  # what a colour needs to have a name; the data's are 0.75 and more
# The misfit is 1 where the smoothed difference reaches this many levels, or this share of a near thing's contrast.
LOWEST, HIGHEST = (-WINDOW, -WINDOW, 2, 0.2, 0), (2 * WINDOW, 2 * WINDOW, WINDOW, 2, 1.5)
STRAY, SHARE = 15.0, 0.13


@dataclass(frozen=True)
class Found:
    """A thing in a picture, its colour None where no name fits; centre in pixels."""

    color: str | None
    shape: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Seen:
    """What a picture shows. Where `misfit` exceeds 1, something in it is not one of the found shapes."""

    things: tuple[Found, ...]
    background: str | None
    misfit: float


@dataclass(frozen=True)
class Verdict:
    """Which parts of a caption a picture fulfils. A thing that is missing has neither colour, shape nor relation."""

    color: bool
    shape: bool
    size: bool
    relation: bool
    background: bool
    count: bool

    @property
    def ok(self) -> bool:
        return all(astuple(self))


@dataclass(frozen=True)
class Patches:
    """m components, each in its window."""

    picture: np.ndarray  # (m,) which picture it is of
    corner: np.ndarray  # (m, 2) top and left of its window
    signal: np.ndarray  # (m, 3, WINDOW, WINDOW) colour minus background, 0 where another component is
    coverage: np.ndarray  # (m, WINDOW, WINDOW) how much of the colour each pixel holds
    own: np.ndarray  # (m, WINDOW, WINDOW) 1 on the component and near it
    free: np.ndarray  # (m, WINDOW, WINDOW) 0 where another component is


def check(image: Tensor, scene: Scene) -> Verdict:
    """Which parts of the scene a uint8 (3, 64, 64) picture fulfils."""
    return compare(see(image[None])[0], scene)


def accuracy(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Shares of uint8 (n, 3, 64, 64) pictures that fulfil their captions, altogether ("accuracy") and by part."""
    if len(images) != len(captions) or not captions:
        raise ValueError(
            f"accuracy needs one caption for each picture, not {len(captions)} for {len(images)}"
        )
    verdicts = [compare(seen, parse(caption)) for seen, caption in zip(see(images), captions, strict=True)]
    shares = np.mean([(verdict.ok, *astuple(verdict)) for verdict in verdicts], axis=0)
    return dict(zip(["accuracy", *(part.name for part in fields(Verdict))], shares.tolist(), strict=True))


def see(images: Tensor) -> list[Seen]:
    """What each of uint8 (n, 3, 64, 64) pictures shows."""
    if images.dtype != torch.uint8 or images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(f"pictures must be uint8 (n, 3, 64, 64), not {images.dtype} {tuple(images.shape)}")
    return [seen for chunk in images.cpu().split(64) for seen in _see(chunk.float())]


def _see(images: Tensor) -> list[Seen]:
    frame = torch.ones(SIDE, SIDE, dtype=torch.bool)
    frame[3:-3, 3:-3] = False
    level = images[:, :, frame].median(dim=2).values  # (n, 3)
    signal = images - level[:, :, None, None]
    patches = _segment(signal)
    shape, geometry = _fit(patches)
    contrast, drawn = _paint(shape, geometry, patches)
    misfit = _misfit(signal, _assemble(drawn, patches, len(images)))
    things: list[list[Found]] = [[] for _ in images]
    for i, picture in enumerate(patches.picture):
        x, y, radius = geometry[i, :3].tolist()
        size = "big" if radius > (RADII["big"][0] + RADII["small"][1]) / 2 else "small"
        color = _name_color(level[picture].numpy() + contrast[i])
        top, left = patches.corner[i].tolist()
        things[picture].append(Found(color, SHAPES[shape[i]], size, left + x, top + y))
    return [
        Seen(tuple(found), _name_background(own), worst)
        for found, own, worst in zip(things, level, misfit.tolist(), strict=True)
    ]


def _near(x: Tensor, side: int) -> Tensor:
    return max_pool2d(x, side, stride=1, padding=side // 2)  # the largest value within side × side


def _label(mask: Tensor) -> Tensor:
    """Connected components of (n, h, w): the same positive number all over each, 0 elsewhere."""
    labels = torch.arange(1.0, mask[0].numel() + 1).view_as(mask[0]) * mask
    while True:
        across = max_pool2d(labels, (1, 3), stride=1, padding=(0, 1))
        down = max_pool2d(labels, (3, 1), stride=1, padding=(1, 0))
        grown = torch.maximum(across, down) * mask
        if torch.equal(grown, labels):
            return labels
        labels = grown


def _segment(signal: Tensor) -> Patches:
    """Components of what differs from the background by half of the strongest difference near it."""
    strength = signal.norm(dim=1)  # (n, h, w)
    labels = _label((strength > FAINT) & (strength > 0.5 * _near(strength, 5)))
    margin = WINDOW // 2
    labels, signal = (torch.nn.functional.pad(x, (margin,) * 4) for x in (labels, signal))
    found = []
    for picture in range(len(labels)):
        values, counts = labels[picture][labels[picture] > 0].unique(return_counts=True)
        order = counts.argsort(descending=True)[:MOST_THINGS]
        for value in values[order][counts[order] >= FEWEST_PIXELS]:
            middle = (labels[picture] == value).nonzero().float().mean(dim=0).round().int()
            top, left = (middle - margin).clamp(0, SIDE).tolist()
            cut = np.s_[..., top : top + WINDOW, left : left + WINDOW]
            patch = _patch(signal[picture][cut], labels[picture][cut], value)
            found.append((picture, (top - margin, left - margin), *patch))
    if not found:
        window = np.zeros((0, WINDOW, WINDOW), np.float32)
        return Patches(np.zeros(0, int), np.zeros((0, 2), int), window[:, None].repeat(3, 1), window, window, window)
    return Patches(*map(np.array, zip(*found, strict=True)))


def _patch(signal: Tensor, labels: Tensor, value: Tensor) -> tuple[np.ndarray, ...]:
    """Signal, coverage, own and free of one component in its window."""
    own, other = (labels == value).float(), ((labels > 0) & (labels != value)).float()
    inner = -_near(-own[None], 3)[0]  # without the pixels that an edge may cross
    contrast = signal[:, (inner if inner.sum() >= 5 else own) > 0].median(dim=1).values
    free = 1 - _near(other[None], 5)[0]
    coverage = torch.einsum("chw,c->hw", signal, contrast) / contrast.square().sum()
    return tuple(x.numpy() for x in (signal * free, coverage * free, _near(own[None], 5)[0] * free, free))


@cache
def _moments(shape: str) -> tuple[float, float]:
    """Area of the shape of radius 1, and how far its centroid lies below its centre."""
    line = (np.arange(400) + 0.5) / 400 * 3 - 1.5
    inside = signed_distance(shape, line[None, :], line[:, None], 1.0) < 0
    return float(inside.mean() * 9), float((inside * line[:, None]).sum() / inside.sum())


def _cover(shape: str, geometry: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coverage (m, WINDOW, WINDOW) of shapes at (m, 5) x, y, radius, amount; u and v from their centres, in radii."""
    x, y, radius = geometry.T[:3, :, None, None]
    line = np.arange(WINDOW, dtype=np.float32) + 0.5
    u, v = (line[None, None, :] - x) / radius, (line[None, :, None] - y) / radius
    distance = radius * signed_distance(shape, u, v, 1.0).astype(np.float32)
    return np.clip(0.5 - distance, 0, 1), u, v


def _start(shape: str, patches: Patches) -> np.ndarray:
    """Geometry (m, 4) of the shape that has each component's area and centroid."""
    line = np.arange(WINDOW, dtype=np.float32) + 0.5
    weight = np.clip(patches.coverage, 0, 1) * patches.own
    mass = weight.sum(axis=(1, 2))
    area, below = _moments(shape)
    radius = np.sqrt(mass / area)
    x, y = weight.sum(axis=1) @ line / mass, weight.sum(axis=2) @ line / mass - below * radius
    return np.stack([x, y, radius, np.ones_like(x), np.zeros_like(x)], axis=1)


def _improve(shape: str, geometry: np.ndarray, patches: Patches) -> tuple[np.ndarray, np.ndarray]:
    """One Gauss-Newton step: the better geometry, and the squared error (m,) of the given one."""
    covered, u, v = _cover(shape, geometry)
    soft = _smooth(covered) - covered
    down, across = np.gradient(covered, axis=(1, 2))
    amount, blur = geometry.T[3:, :, None, None]
    slopes = np.stack([-amount * across, -amount * down, -amount * (u * across + v * down), covered, soft], axis=1)
    slopes = (slopes * patches.free[:, None]).reshape(-1, 5, WINDOW**2)
    error = (patches.coverage - (amount * covered + blur * soft) * patches.free).reshape(-1, WINDOW**2, 1)
    normal = slopes @ slopes.transpose(0, 2, 1) + 1e-2 * np.eye(5, dtype=np.float32)
    step = np.linalg.solve(normal, slopes @ error)[..., 0]
    better = geometry + np.clip(step, -1, 1)
    return np.clip(better, LOWEST, HIGHEST).astype(np.float32), np.square(error).sum((1, 2))


def _fit(patches: Patches) -> tuple[np.ndarray, np.ndarray]:
    """For each component the index (m,) of the shape that fits best, and its geometry (m, 4)."""
    geometries, errors = [], []
    for shape in SHAPES:
        geometry, _ = _improve(shape, _start(shape, patches), patches)
        geometry, error = _improve(shape, geometry, patches)
        geometries.append(geometry)
        errors.append(error)
    best = np.argmin(errors, axis=0)
    return best, np.stack(geometries)[best, np.arange(len(best))]


def _smooth(pictures: np.ndarray) -> np.ndarray:
    """Gaussian of sigma 1 over the last two axes, so that blur and noise weigh little and missing pieces much."""
    kernel = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    blur = torch.from_numpy((kernel / kernel.sum()).astype(np.float32))
    x = torch.from_numpy(pictures).view(-1, 1, *pictures.shape[-2:])
    x = torch.nn.functional.conv2d(x, blur.view(1, 1, 7, 1), padding=(3, 0))
    return torch.nn.functional.conv2d(x, blur.view(1, 1, 1, 7), padding=(0, 3)).view(pictures.shape).numpy()


def _paint(shape: np.ndarray, geometry: np.ndarray, patches: Patches) -> tuple[np.ndarray, np.ndarray]:
    """Colour minus background (m, 3) and drawing (m, 3, WINDOW, WINDOW), each channel with a blur of its own."""
    contrast, drawn = np.zeros((len(shape), 3), np.float32), np.zeros_like(patches.signal)
    for index, name in enumerate(SHAPES):
        chosen = shape == index
        covered = _cover(name, geometry[chosen])[0]
        basis = np.stack([covered, _smooth(covered) - covered], axis=1).reshape(-1, 2, WINDOW**2)
        seen = (basis.reshape(-1, 2, WINDOW, WINDOW) * patches.free[chosen][:, None]).reshape(basis.shape)
        signal = patches.signal[chosen].reshape(-1, 3, WINDOW**2)
        normal = seen @ seen.transpose(0, 2, 1) + 1e-2 * np.eye(2, dtype=np.float32)
        weights = np.linalg.solve(normal, seen @ signal.transpose(0, 2, 1))  # (m, 2, 3)
        contrast[chosen] = weights[:, 0]
        drawn[chosen] = (weights.transpose(0, 2, 1) @ basis).reshape(-1, 3, WINDOW, WINDOW)
    return contrast, drawn


def _assemble(drawn: np.ndarray, patches: Patches, count: int) -> np.ndarray:
    """The drawings in their places: (count, 3, SIDE, SIDE)."""
    margin = WINDOW // 2
    canvas = np.zeros((count, 3, SIDE + 2 * margin, SIDE + 2 * margin), np.float32)
    for picture, (top, left), patch in zip(patches.picture, patches.corner + margin, drawn, strict=True):
        canvas[picture, :, top : top + WINDOW, left : left + WINDOW] += patch
    return canvas[..., margin:-margin, margin:-margin]


def _misfit(signal: Tensor, drawn: np.ndarray) -> np.ndarray:
    """The largest difference (n,) of each picture from what was understood of it, in tolerances."""
    difference = np.linalg.norm(_smooth(signal.numpy() - drawn), axis=1)
    contrast = _near(torch.from_numpy(np.linalg.norm(drawn, axis=1)), 9).numpy()
    return (difference / np.maximum(STRAY, SHARE * contrast)).max(axis=(1, 2))


def _name_color(rgb: np.ndarray) -> str | None:
    hue, saturation, value = colorsys.rgb_to_hsv(*np.clip(rgb / 255, 0, 1).tolist())
    if saturation < SATURATION or value < VALUE:
        return None
    return min(HUES, key=lambda name: abs((360 * hue - HUES[name] + 180) % 360 - 180))


def _name_background(level: Tensor) -> str | None:
    distances = {name: (level - gray).abs().max().item() for name, gray in BACKGROUNDS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= BACKGROUND_TOLERANCE else None


def _agree(found: Found | None, thing: Thing) -> tuple[bool, bool, bool]:
    """Whether colour, shape and size are those of the caption's thing."""
    if found is None:
        return False, False, thing.size is None
    return found.color == thing.color, found.shape == thing.shape, thing.size in (None, found.size)


def _lie(chosen: Sequence[Found | None], scene: Scene) -> bool:
    """Whether the first thing lies to the second as the caption says, along the axis that parts them most."""
    if scene.relation is None:
        return True
    first, second = chosen
    if first is None or second is None:
        return False
    x, y = first.x - second.x, first.y - second.y
    return scene.relation == max(RELATIONS, key=lambda name: RELATIONS[name][0] * x + RELATIONS[name][1] * y)


def compare(seen: Seen, scene: Scene) -> Verdict:
    """Match the caption's things with seen ones as well as they can be, then judge each part of the caption."""

    def details(chosen: Sequence[Found | None]) -> int:
        return sum(sum(_agree(*pair)) for pair in zip(chosen, scene.things, strict=True)) + _lie(chosen, scene)

    missing = [None] * (len(scene.things) - len(seen.things))
    chosen = max(permutations([*seen.things, *missing], len(scene.things)), key=details)
    agreed = [_agree(*pair) for pair in zip(chosen, scene.things, strict=True)]
    color, shape, size = (all(part) for part in zip(*agreed, strict=True))
    return Verdict(
        color=color,
        shape=shape and seen.misfit <= 1,
        size=size,
        relation=_lie(chosen, scene),
        background=seen.background == scene.background,
        count=len(seen.things) == len(scene.things),
    )
