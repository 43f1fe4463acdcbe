"""The content of an image of shapes: one or two things with their colours, sizes and positions, and the background.

The hash of a caption determines its split.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

HUES = {"red": 0, "orange": 30, "yellow": 50, "green": 125, "cyan": 187, "blue": 225, "purple": 278, "pink": 325}
BACKGROUNDS = {"white": 255, "black": 0, "gray": 128}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring")
RADII = {"big": (11.25, 12.0), "small": (8.0, 8.75)}  # pixels of a 64-pixel image
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # direction of the first thing
# Colour-shape pairs that no training image contains, to test whether the model combines what it has only seen apart.
UNSEEN = frozenset(zip(HUES, SHAPES, strict=False))
Split = Literal["train", "held_out", "unseen"]


@dataclass(frozen=True)
class Thing:
    """One object of a caption; `size` is None if the caption does not give it."""

    color: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        words = " ".join(word for word in (self.size, self.color, self.shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """The content of a caption: one thing, or two things and the position of the first relative to the second.

    `relation` and `background` are None if the caption does not give them.
    """

    things: tuple[Thing, ...]
    relation: str | None
    background: str | None

    @property
    def caption(self) -> str:
        """The canonical caption, for a scene whose background is known."""
        return f" {self.relation} ".join(map(str, self.things)) + f" on a {self.background} background"

    def reduced(self, background: bool, sizes: bool, relation: bool) -> "Scene":
        """Returns the scene without the attributes that are not to be kept; equal things have no relation."""
        things = tuple(thing if sizes else replace(thing, size=None) for thing in self.things)
        relation = relation and len(set(things)) == len(things)
        return Scene(things, self.relation if relation else None, self.background if background else None)

    def describes_the_same(self, other: "Scene") -> bool:
        """Whether both describe the same images; the order of things without a relation is irrelevant."""
        if self.relation is None and other.relation is None:
            things = sorted(map(str, self.things)) == sorted(map(str, other.things))
            return things and self.background == other.background
        return self == other

    @property
    def is_unseen(self) -> bool:
        """Whether one of its things has a colour-shape pair of `UNSEEN`."""
        return any((thing.color, thing.shape) in UNSEEN for thing in self.things)

    @property
    def split(self) -> Split:
        if self.is_unseen:
            return "unseen"
        return "held_out" if zlib.crc32(self.caption.encode()) % 8 == 0 else "train"


def random_scene(rng: np.random.Generator) -> Scene:
    """Returns a random scene: 40 % have one thing; 75 % of single things and 25 % of things in pairs have a size."""
    single = rng.random() < 0.4
    things = []
    for color in rng.choice(list(HUES), 1 if single else 2, replace=False):
        sized = rng.random() < (0.75 if single else 0.25)
        size = str(rng.choice(list(RADII))) if sized else None
        things.append(Thing(str(color), str(rng.choice(SHAPES)), size))
    relation = None if single else str(rng.choice(list(RELATIONS)))
    return Scene(tuple(things), relation, str(rng.choice(list(BACKGROUNDS))))


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns the scene with one attribute changed or two things swapped, as a hard negative for contrastive training.

    The result may equal the scene.
    """
    things = list(scene.things)
    first = int(rng.integers(len(things)))
    thing, relation, background = things[first], scene.relation, scene.background
    change = rng.choice(["color", "shape", "size", "background", "relation", "order", "colors", "shapes"])
    if change == "color":
        taken = {other.color for other in things}
        things[first] = replace(thing, color=str(rng.choice([color for color in HUES if color not in taken])))
    elif change == "shape":
        things[first] = replace(thing, shape=str(rng.choice(SHAPES)))
    elif change == "size":
        things[first] = replace(thing, size=str(rng.choice(list(RADII))))
    elif change == "background":
        background = str(rng.choice(list(BACKGROUNDS)))
    elif relation and change == "relation":
        relation = str(rng.choice(list(RELATIONS)))
    elif relation and change == "order":
        things.reverse()
    elif relation:
        one, other = things
        to_first = {"color": other.color} if change == "colors" else {"shape": other.shape}
        to_second = {"color": one.color} if change == "colors" else {"shape": one.shape}
        things = [replace(one, **to_first), replace(other, **to_second)]
    return Scene(tuple(things), relation, background)
