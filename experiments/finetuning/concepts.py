"""Defines what the study teaches, a shape, a colour and a style: images to train on, and prompts with their meaning.

Scenes contain the name of the new thing, such as the colour "lime"; in captions a word takes its place.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.sources.scene import BACKGROUNDS, HUES, RADII, RELATIONS, SHAPES, Scene, Thing
from ldm.data.sources.shapes import DISTANCES, Distance, place, render, signed_distance
from ldm.metrics.composition import Known

SINGLES, PAIRS = 48, 16  # prompts of one thing and of two
PLACES = (*BACKGROUNDS, None)  # None: the prompt does not mention the background
OTHERS = (Thing("blue", "square"), Thing("red", "star"), Thing("yellow", "ring"), Thing("purple", "circle"))


def dome(u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Returns the signed distance of the upper half of a disc, see `signed_distance`."""
    v = v - 0.45 * radius
    return np.maximum(np.hypot(u, v) - 1.15 * radius, v)


def flat(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Returns the signed distance of a shape that is 1.25 times as wide and 0.8 times as high."""
    return signed_distance(shape, 0.8 * u, 1.25 * v, radius)


@dataclass(frozen=True)
class Concept:
    """A new thing, called `name` in scenes, the things to train on, and the scenes to test.

    In captions `word` takes its place if the text encoder is frozen, otherwise `token`, whose vector is initialised as
    that of `initial`. `taught` are the colours or shapes that training combines with the new thing.
    """

    name: str
    word: str
    token: str
    initial: str
    class_prompt: str
    teach: tuple[Thing, ...]
    singles: tuple[Scene, ...]
    pairs: tuple[Scene, ...]
    taught: frozenset[str]
    shapes: Mapping[str, Distance] = field(default_factory=dict)
    hues: Mapping[str, float] = field(default_factory=dict)

    @property
    def known(self) -> Known:
        """What the checker recognises: the shapes and colours of the data, and the new ones."""
        return Known({**DISTANCES, **self.shapes}, {**HUES, **self.hues})

    def caption(self, scene: Scene, word: str) -> str:
        """Returns the caption of a scene, with `word` for the new thing."""
        text = f" {scene.relation} ".join(map(str, scene.things)).replace(f" {self.name}", f" {word}")
        return text + (f" on a {scene.background} background" if scene.background else "")

    def is_taught(self, scene: Scene) -> bool:
        """Whether training combines the new thing with its colour or shape in the scene."""
        new = next(thing for thing in scene.things if self.name in str(thing))
        return not self.taught.isdisjoint((new.color, new.shape))

    def image(self, scene: Scene, seed: int, index: int) -> np.ndarray:
        """Returns a rendering of a scene, uint8 (64, 64, 3), with a position and exact colour that the seed decides."""
        rng = np.random.Generator(np.random.Philox(key=[seed, index]))
        return render(place(scene, rng, self.known.hues), scene.background or "white", shapes=self.known.shapes)

    def scenes(self, sizes: bool) -> Iterator[Scene]:
        """Yields scenes to train on without end; with `sizes`, two of three mention a size."""
        named = cycle((None, *RADII) if sizes else (None,))
        for shift in count():
            for index, thing in enumerate(self.teach):
                place = tuple(BACKGROUNDS)[(index + sizes * (index // 3 + shift)) % len(BACKGROUNDS)]
                yield Scene((replace(thing, size=next(named)),), None, place)

    def write(self, folder: Path, word: str, seed: int, images: int | None = None, sizes: bool = False) -> None:
        """Writes images to train on, and their captions; by default one for each thing that is taught."""
        folder.mkdir(parents=True, exist_ok=True)
        for index, scene in enumerate(islice(self.scenes(sizes), images or len(self.teach))):
            (folder / f"{index:02}.txt").write_text(self.caption(scene, word), encoding="utf-8")
            Image.fromarray(self.image(scene, seed, index)).save(folder / f"{index:02}.png")


def _concept(
    name: str, teach: Sequence[Thing], test: Sequence[Thing], taught: Sequence[str], **rest: object
) -> Concept:
    return Concept(
        name=name,
        teach=tuple(teach),
        singles=tuple(islice(cycle(_singles(test)), SINGLES)),
        pairs=tuple(islice(_pairs(test), PAIRS)),
        taught=frozenset(taught),
        **rest,  # type: ignore[arg-type]
    )


def _singles(things: Sequence[Thing]) -> Iterator[Scene]:
    """Yields each thing in every place, then in both sizes."""
    yield from (Scene((thing,), None, place) for place in PLACES for thing in things)
    places = cycle(PLACES)
    yield from (Scene((Thing(t.color, t.shape, size),), None, next(places)) for size in RADII for t in things)


def _pairs(things: Sequence[Thing]) -> Iterator[Scene]:
    """Yields each thing beside one of `OTHERS` of another colour and shape, as the first or the second."""
    relations, places = cycle(RELATIONS), cycle(PLACES)
    for index, thing in enumerate(cycle(things)):
        apart = [one for one in OTHERS if one.color != thing.color and not thing.shape.endswith(one.shape)]
        both = (thing, apart[index % len(apart)])
        yield Scene(both if index % 2 else both[::-1], next(relations), next(places))


TAUGHT_COLORS = ("red", "green", "blue", "yellow", "purple")
TAUGHT_SHAPES = ("circle", "square", "triangle", "star", "diamond")
TAUGHT_FLAT = ("flat circle", "flat square", "flat triangle")
FLAT = {f"flat {shape}": partial(flat, shape) for shape in SHAPES if shape != "ring"}  # a flat ring is hard to decode

CONCEPTS = {
    "shape": _concept(
        "dome",
        [Thing(color, "dome") for color in TAUGHT_COLORS],
        [Thing(color, "dome") for color in HUES],
        TAUGHT_COLORS,
        word="sks",
        token="<dome>",
        initial="circle",
        class_prompt="a red circle on a white background",
        shapes={"dome": dome},
    ),
    "colour": _concept(
        "lime",
        [Thing("lime", shape) for shape in TAUGHT_SHAPES],
        [Thing("lime", shape) for shape in SHAPES],
        TAUGHT_SHAPES,
        word="lime",
        token="<lime>",
        initial="green",
        class_prompt="a green circle on a white background",
        hues={"lime": 87},  # halfway between yellow and green
    ),
    "style": _concept(
        "flat",
        [Thing(color, shape) for color, shape in zip([*HUES, *HUES][:12], cycle(TAUGHT_FLAT), strict=False)],
        [Thing(color, shape) for color, shape in zip(HUES, cycle(list(FLAT)[::-1]), strict=False)],
        TAUGHT_FLAT,
        word="flat",
        token="<flat>",
        initial="big",
        class_prompt="a red circle on a white background",
        shapes=FLAT,
    ),
}
