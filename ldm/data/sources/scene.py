"""What a picture of shapes shows, in words: one thing or two, their colours, sizes and places, and the background.

A caption belongs to one split for ever: a hash of its text decides.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

HUES = {"red": 0, "orange": 30, "yellow": 50, "green": 125, "cyan": 187, "blue": 225, "purple": 278, "pink": 325}
BACKGROUNDS = {"white": 255, "black": 0, "gray": 128}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring")
RADII = {"big": (11.25, 12.0), "small": (8.0, 8.75)}  # pixels of a 64-pixel picture
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # where the first thing is
# Colour-shape pairs that no training picture holds: can the model draw what it has only seen apart?
UNSEEN = frozenset(zip(HUES, SHAPES, strict=False))
Split = Literal["train", "held_out", "unseen"]


@dataclass(frozen=True)
class Thing:
    """What a caption says of one object; `size` is None where it says nothing."""

    color: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        words = " ".join(word for word in (self.size, self.color, self.shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """What a caption says of an image: one thing, or two and where the first is; what it leaves out is None."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str | None

    @property
    def caption(self) -> str:
        """The caption of a scene of which all is known, always in the same words."""
        return f" {self.relation} ".join(map(str, self.things)) + f" on a {self.background} background"

    def reduced(self, background: bool, sizes: bool, relation: bool) -> "Scene":
        """The scene without what is not kept."""
        things = tuple(thing if sizes else replace(thing, size=None) for thing in self.things)
        return Scene(things, self.relation if relation else None, self.background if background else None)

    @property
    def is_unseen(self) -> bool:
        """Whether one of its things is of a colour and shape that no training image shows together."""
        return any((thing.color, thing.shape) in UNSEEN for thing in self.things)

    @property
    def split(self) -> Split:
        if self.is_unseen:
            return "unseen"
        return "held_out" if zlib.crc32(self.caption.encode()) % 8 == 0 else "train"


def draw_scene(rng: np.random.Generator) -> Scene:
    """A scene at random: 40 % with one thing; sizes are said of most single things and of few in pairs."""
    single = rng.random() < 0.4
    things = []
    for color in rng.choice(list(HUES), 1 if single else 2, replace=False):
        said = rng.random() < (0.75 if single else 0.25)
        size = str(rng.choice(list(RADII))) if said else None
        things.append(Thing(str(color), str(rng.choice(SHAPES)), size))
    relation = None if single else str(rng.choice(list(RELATIONS)))
    return Scene(tuple(things), relation, str(rng.choice(list(BACKGROUNDS))))


def varied(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one thing about it changed, or two things swapped: what a caption must be told apart from."""
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
        swap = {"color": other.color} if change == "colors" else {"shape": other.shape}
        back = {"color": one.color} if change == "colors" else {"shape": one.shape}
        things = [replace(one, **swap), replace(other, **back)]
    return Scene(tuple(things), relation, background)
