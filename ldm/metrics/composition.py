"""Checks whether an image of shapes shows what its caption says, by analysis by synthesis without a trained network.

The image is segmented into things, each known shape is fitted to every thing, and colours and sizes are named.
The fitted scene is then rendered and compared with the image: what it does not explain (blobs, ghosts, halves, stray
bits) is the misfit.
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from itertools import permutations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, pad

from ldm.data.sources.phrasing import parse
from ldm.data.sources.scene import BACKGROUNDS, HUES, RADII, RELATIONS, Scene
from ldm.data.sources.shapes import DISTANCES, Distance

SIDE = 64  # image side in pixels; the radii and tolerances below are in such pixels and in levels of [0, 255]
WINDOW = 40  # side of the window cut out around a thing; the largest thing spans 32
MARGIN = WINDOW // 2
CENTERS = np.arange(WINDOW, dtype=np.float32) + 0.5  # pixel centres along one side of a window
MOST_THINGS, FEWEST_PIXELS = 3, 16  # only an image's largest components count; smaller ones are specks
FAINT = 40.0  # levels; the palette's weakest colour is 100 from gray
LEVEL_TOLERANCE = 24.0  # of a background
SATURATION, VALUE = 0.5, 0.55  # minimum for a colour to have a name; the data's colours have at least 0.75
BIG = (RADII["big"][0] + RADII["small"][1]) / 2
LIMITS = (-40, -40, 2, 0.2, 0), (80, 80, 40, 2, 1.5)  # bounds of a fit's x, y, radius, amount, blur
BLENDED = 0.35  # a larger share of a second shape leaves a thing without a name; a 50/50 blend has about 0.5
# The misfit is 1 where the smoothed difference reaches these levels or this share of a nearby thing's contrast.
STRAY, SHARE = 25.0, 0.3


@dataclass(frozen=True)
class Known:
    """The shapes and colours, hues in degrees, that are recognised."""

    shapes: Mapping[str, Distance]
    hues: Mapping[str, float]


DATA = Known(DISTANCES, HUES)  # what the data consists of


@dataclass(frozen=True)
class Found:
    """A thing in an image, with its centre in pixels; colour or shape is None if no name fits."""

    color: str | None
    shape: str | None
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Seen:
    """The content of an image. A `misfit` above 1 means that the found shapes do not explain all of it."""

    things: tuple[Found, ...]
    background: str | None
    misfit: float


@dataclass(frozen=True)
class Verdict:
    """Which parts of a caption an image satisfies. A missing thing fails colour, shape and relation."""

    color: bool
    shape: bool
    size: bool
    relation: bool
    background: bool
    count: bool

    @property
    def ok(self) -> bool:
        return all(astuple(self))


PARTS = ("accuracy", *(part.name for part in fields(Verdict)))  # the full caption, then each part of it


@dataclass(frozen=True)
class Patches:
    """m components, each in a window of WINDOW × WINDOW pixels; all arrays are 0 where another component is."""

    corner: np.ndarray  # (m, 3) index of the image; top and left of the window
    signal: np.ndarray  # (m, 3, h, w) colour minus background
    coverage: np.ndarray  # (m, h, w) how much of the component's colour each pixel has
    own: np.ndarray  # (m, h, w) 1 on the component and near it
    free: np.ndarray  # (m, h, w) 1


def check(image: Tensor, scene: Scene) -> Verdict:
    """Returns which parts of the scene an image uint8 (3, 64, 64) satisfies."""
    return compare(see(image[None])[0], scene)


def accuracy(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Returns the shares of images uint8 (n, 3, 64, 64) that satisfy their caption ("accuracy") and each part of it."""
    return dict(zip(PARTS, verdicts(images, captions).double().mean(dim=0).tolist(), strict=True))


def verdicts(images: Tensor, captions: Sequence[str]) -> Tensor:
    """Returns which of PARTS of its caption each image uint8 (n, 3, 64, 64) satisfies: bool (n, parts)."""
    if len(images) != len(captions) or not captions:
        raise ValueError(f"accuracy needs one caption for each image, not {len(captions)} for {len(images)}")
    found = [compare(seen, parse(caption)) for seen, caption in zip(see(images), captions, strict=True)]
    return torch.tensor([(verdict.ok, *astuple(verdict)) for verdict in found])


def see(images: Tensor, known: Known = DATA) -> list[Seen]:
    """Returns what each image uint8 (n, 3, 64, 64) shows, in terms of the known shapes and colours."""
    if images.dtype != torch.uint8 or images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(f"images must be uint8 (n, 3, {SIDE}, {SIDE}), not {images.dtype} {tuple(images.shape)}")
    return [seen for chunk in images.cpu().contiguous().split(64) for seen in _see(chunk.float(), known)]


def _see(images: Tensor, known: Known) -> list[Seen]:
    frame = torch.ones(SIDE, SIDE, dtype=torch.bool)
    frame[3:-3, 3:-3] = False
    level = images[:, :, frame].median(dim=2).values  # (n, 3)
    signal = images - level[:, :, None, None]
    patches = _segment(signal)
    names, distances = list(known.shapes), list(known.shapes.values())
    shape, geometry, rival = _fit(distances, patches)
    contrast, rendered = _render(distances, shape, geometry, patches)
    misfit = _misfit(signal, rendered, patches)
    things: list[list[Found]] = [[] for _ in images]
    for i, (image, top, left) in enumerate(patches.corner.tolist()):
        x, y, radius = geometry[i, :3].tolist()
        name = names[shape[i]] if rival[i] < BLENDED else None
        color = _name_color(level[image].numpy() + contrast[i], known.hues)
        things[image].append(Found(color, name, "big" if radius > BIG else "small", left + x, top + y))
    return [Seen(tuple(things[i]), _name_background(level[i]), float(misfit[i])) for i in range(len(images))]


def _near(x: Tensor, side: int) -> Tensor:
    """Returns the maximum of x (n, h, w) over side × side around each pixel; n may be 0."""
    return max_pool2d(x, side, stride=1, padding=side // 2) if len(x) else x


def _label(mask: Tensor) -> Tensor:
    """Labels the connected components of (n, h, w): 1 + the last position of each component, 0 elsewhere."""
    neighbours = np.zeros((3, 3, 3))
    neighbours[1] = ndimage.generate_binary_structure(2, 1)  # within an image, and not diagonally
    components, count = ndimage.label(mask.numpy(), neighbours)
    positions = np.broadcast_to(np.arange(1.0, mask[0].numel() + 1).reshape(mask[0].shape), mask.shape)
    last = ndimage.maximum(positions, components, np.arange(1, count + 1))
    return torch.from_numpy(np.append(0.0, last)[components]).float()


def _largest(labels: Tensor) -> list[tuple[float, int, int]]:
    """Returns label, mean row and mean column of the largest components of one image."""
    values, counts = labels[labels > 0].unique(return_counts=True)
    order = counts.argsort(descending=True)[:MOST_THINGS]
    values = values[order][counts[order] >= FEWEST_PIXELS]
    return [(v.item(), *(labels == v).nonzero().float().mean(dim=0).round().int().tolist()) for v in values]


def _segment(signal: Tensor) -> Patches:
    """Cuts out the components that differ from the background by at least half of the largest difference nearby."""
    strength = signal.norm(dim=1)  # (n, h, w)
    labels = _label((strength > FAINT) & (strength > 0.5 * _near(strength, 5)))
    spots = [(i, *spot) for i, each in enumerate(labels) for spot in _largest(each)]
    image, value, row, column = torch.tensor(spots).view(-1, 4).T.long()[..., None, None]
    window = image, row + torch.arange(WINDOW)[:, None], column + torch.arange(WINDOW)  # in padded images
    labels = pad(labels, (MARGIN,) * 4)[window]
    signal = pad(signal, (MARGIN,) * 4).movedim(1, -1)[window].movedim(-1, 1)  # (m, 3, h, w)
    own, other = (labels == value).float(), ((labels > 0) & (labels != value)).float()
    inner = -_near(-own, 3)  # without the pixels that an outline may cross
    inner = torch.where(inner.sum((1, 2), keepdim=True) >= 5, inner, own)
    contrast = torch.where(inner[:, None] > 0, signal, torch.nan).flatten(2).nanmedian(dim=2).values
    free = 1 - _near(other, 5) * (1 - own)
    coverage = torch.einsum("mchw,mc->mhw", signal, contrast / contrast.square().sum(1, keepdim=True)) * free
    corner = torch.cat([image, row - MARGIN, column - MARGIN], dim=1).view(-1, 3)
    return Patches(*map(Tensor.numpy, (corner, signal * free[:, None], coverage, _near(own, 5) * free, free)))


@cache
def _moments(distance: Distance) -> tuple[float, float]:
    """Returns the area of the shape of radius 1, and how far its centroid is below its centre."""
    line = (np.arange(400) + 0.5) / 400 * 3 - 1.5
    inside = distance(line[None, :], line[:, None], 1.0) < 0
    return float(inside.mean() * 9), float((inside * line[:, None]).sum() / inside.sum())


def _start(distance: Distance, patches: Patches) -> np.ndarray:
    """Initialises the geometry (m, 5) from area and centroid: x, y, radius, amount, blur."""
    weight = np.clip(patches.coverage, 0, 1) * patches.own
    mass = np.maximum(weight.sum(axis=(1, 2)), 1)
    area, below = _moments(distance)
    radius = np.sqrt(mass / area)
    x, y = weight.sum(axis=1) @ CENTERS / mass, weight.sum(axis=2) @ CENTERS / mass - below * radius
    return np.stack([x, y, radius, np.ones_like(x), np.zeros_like(x)], axis=1)


def _axes(geometry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far pixel centres are right of (m, 1, w) and below (m, h, 1) the shape's centre, in radii."""
    x, y, radius = geometry.T[:3, :, None, None]
    return (CENTERS - x) / radius, (CENTERS[:, None] - y) / radius


def _basis(distance: Distance, geometry: np.ndarray) -> np.ndarray:
    """Returns (m, 2, h, w): the coverage of a shape in its window, and how a blur of sigma 1 changes it."""
    pixels = geometry[:, 2, None, None] * distance(*_axes(geometry), 1.0).astype(np.float32)
    coverage = np.clip(0.5 - pixels, 0, 1)
    return np.stack([coverage, _smooth(coverage) - coverage], axis=1)


def _smooth(images: np.ndarray) -> np.ndarray:
    """Applies a Gaussian blur of sigma 1 over the last two axes."""
    kernel = np.exp(-0.5 * np.arange(-3, 4, dtype=np.float32) ** 2)
    blur = torch.from_numpy(kernel / kernel.sum())
    x = torch.from_numpy(images).view(-1, 1, *images.shape[-2:])
    x = conv2d(x, blur.view(1, 1, 7, 1), padding=(3, 0))
    return conv2d(x, blur.view(1, 1, 1, 7), padding=(0, 3)).view(images.shape).numpy()


def _solve(basis: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Returns least-squares weights (m, k, c) of basis (m, k, pixels) for target (m, c, pixels).

    A small ridge penalty keeps them finite.
    """
    normal = basis @ basis.transpose(0, 2, 1) + 1e-2 * np.eye(basis.shape[1], dtype=np.float32)
    return np.linalg.solve(normal, basis @ target.transpose(0, 2, 1))


def _improve(distance: Distance, geometry: np.ndarray, patches: Patches) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Takes one Gauss-Newton step: returns the new geometry, and the basis and squared error (m,) of the given one."""
    basis = _basis(distance, geometry) * patches.free[:, None]
    down, across = np.gradient(basis[:, 0], axis=(1, 2))
    u, v = _axes(geometry)
    moves = np.stack([across, down, u * across + v * down], axis=1) * -geometry[:, 3, None, None, None]
    slopes = np.concatenate([moves * patches.free[:, None], basis], axis=1).reshape(-1, 5, WINDOW**2)
    error = patches.coverage - np.einsum("mk,mkhw->mhw", geometry[:, 3:], basis)
    step = _solve(slopes, error.reshape(-1, 1, WINDOW**2))[..., 0]
    better = np.clip(geometry + np.clip(step, -1, 1), *LIMITS).astype(np.float32)
    return better, basis.reshape(-1, 2, WINDOW**2), np.square(error).sum((1, 2))


def _fit(distances: Sequence[Distance], patches: Patches) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns index (m,) and geometry (m, 5) of each component's best shape, and the runner-up's share (m,)."""
    fits = []
    for distance in distances:
        geometry, *_ = _improve(distance, _start(distance, patches), patches)
        fits.append(_improve(distance, geometry, patches))
    geometries, bases, errors = zip(*fits, strict=True)
    best, each = np.argmin(errors, axis=0), np.arange(len(patches.corner))
    chosen, target = np.stack(bases)[best, each], patches.coverage.reshape(-1, 1, WINDOW**2)
    amount = np.stack([_solve(np.append(chosen, basis[:, :1], axis=1), target)[:, 2, 0] for basis in bases])
    amount[best, each] = 0
    return best, np.stack(geometries)[best, each], amount.max(axis=0)


def _render(
    distances: Sequence[Distance], shape: np.ndarray, geometry: np.ndarray, patches: Patches
) -> tuple[np.ndarray, np.ndarray]:
    """Returns colour minus background (m, 3) and the rendered shapes (m, 3, h, w), blurred per channel."""
    contrast, rendered = np.zeros((len(shape), 3), np.float32), np.zeros_like(patches.signal)
    for index, distance in enumerate(distances):
        mine = shape == index
        basis = _basis(distance, geometry[mine])
        visible = (basis * patches.free[mine][:, None]).reshape(-1, 2, WINDOW**2)
        weights = _solve(visible, patches.signal[mine].reshape(-1, 3, WINDOW**2))
        contrast[mine] = weights[:, 0]
        rendered[mine] = np.einsum("mkc,mkhw->mchw", weights, basis)
    return contrast, rendered


def _misfit(signal: Tensor, rendered: np.ndarray, patches: Patches) -> np.ndarray:
    """Returns the largest difference (n,) between each image and its rendered scene, in units of the tolerance."""
    canvas = np.zeros_like(pad(signal, (MARGIN,) * 4).numpy())
    for (image, top, left), patch in zip(patches.corner, rendered, strict=True):
        canvas[image, :, top + MARGIN :, left + MARGIN :][:, :WINDOW, :WINDOW] += patch
    canvas = canvas[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
    difference = np.linalg.norm(_smooth(signal.numpy() - canvas), axis=1)  # smoothed to suppress noise
    contrast = _near(torch.from_numpy(np.linalg.norm(canvas, axis=1)), 9).numpy()
    return (difference / np.maximum(STRAY, SHARE * contrast)).max(axis=(1, 2))


def _name_color(rgb: np.ndarray, hues: Mapping[str, float]) -> str | None:
    hue, saturation, value = colorsys.rgb_to_hsv(*np.clip(rgb / 255, 0, 1).tolist())
    if saturation < SATURATION or value < VALUE:
        return None
    return min(hues, key=lambda name: abs((360 * hue - hues[name] + 180) % 360 - 180))


def _name_background(level: Tensor) -> str | None:
    return next((name for name, gray in BACKGROUNDS.items() if (level - gray).abs().max() <= LEVEL_TOLERANCE), None)


def _agree(chosen: Sequence[Found | None], scene: Scene) -> list[list[bool]]:
    """Returns whether colour, shape and size are right, a list over the scene's things each, and the relation."""
    pairs = list(zip(chosen, scene.things, strict=True))
    return [
        [found is not None and found.color == thing.color for found, thing in pairs],
        [found is not None and found.shape == thing.shape for found, thing in pairs],
        [thing.size is None or (found is not None and found.size == thing.size) for found, thing in pairs],
        [_relation_holds(chosen, scene.relation)],
    ]


def _relation_holds(chosen: Sequence[Found | None], relation: str | None) -> bool:
    """Returns whether the relation is that of the first thing to the second on the axis that separates them most."""
    seen = [found for found in chosen if found]
    if relation is None or len(seen) < 2:
        return relation is None
    x, y = seen[0].x - seen[1].x, seen[0].y - seen[1].y
    return relation == max(RELATIONS, key=lambda name: RELATIONS[name][0] * x + RELATIONS[name][1] * y)


def compare(seen: Seen, scene: Scene) -> Verdict:
    """Finds the best match of the caption's things with the seen ones, then judges each part of the caption."""
    missing = [None] * (len(scene.things) - len(seen.things))
    matches = permutations([*seen.things, *missing], len(scene.things))
    best = max((_agree(chosen, scene) for chosen in matches), key=lambda parts: sum(map(sum, parts)))
    color, shape, size, relation = map(all, best)
    background = seen.background in ((scene.background,) if scene.background else BACKGROUNDS)
    count = len(seen.things) == len(scene.things)
    return Verdict(color, shape and seen.misfit <= 1, size, relation, background, count)
