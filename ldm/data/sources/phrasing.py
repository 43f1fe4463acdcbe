"""Free phrasing: random captions of scenes and emoji as people would write them, and the parser of the former."""

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.sources.scene import BACKGROUNDS, HUES, RADII, SHAPES, Scene, Thing

SYNONYMS = {  # of each relation; canonical captions use the first
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
UNRELATED = ("and", "next to", "beside", "with")  # between two things if the caption gives no relation
PREFIXES = ("a picture of", "an image of", "a drawing of", "draw")
ON = (" on a {} background", " on a {} background", " on {}", ", {} background", " with a {} background")
EMOJI = ("{}", "{}", "{article}", "{article}", "{article}", "an emoji of {article}", "{} emoji", "{} on white")
# Shares of the captions that omit an attribute or use another form.
NO_BACKGROUND, NO_SIZES, NO_RELATION = 0.65, 0.5, 0.4
NO_ARTICLE, THAT_IS, PREFIXED, TWINS = 0.3, 0.15, 0.15, 0.15


def left_out(rng: np.random.Generator) -> Callable[[Scene], Scene]:
    """Returns a function that omits a random choice of attributes from a scene.

    A scene and its near misses omit the same attributes, so that their captions stay comparable.
    """
    background, sizes, relation = (bool(rng.random() >= share) for share in (NO_BACKGROUND, NO_SIZES, NO_RELATION))
    return lambda scene: scene.reduced(background, sizes, relation)


def twins(scene: Scene) -> Scene:
    """Returns a scene with the first thing twice, for captions such as "two red circles"; single things stay single."""
    return replace(scene, things=(scene.things[0],) * len(scene.things))


def phrase(scene: Scene, rng: np.random.Generator) -> str:
    """Returns a random caption of the attributes that the scene gives."""
    things = scene.things
    if len(things) == 2 and things[0] == things[1]:
        text = _plural(things[0])
    else:
        article = rng.random() >= NO_ARTICLE
        joint = rng.choice(UNRELATED if scene.relation is None else SYNONYMS[scene.relation])
        text = f" {joint} ".join(_noun(thing, article, rng) for thing in things)
    if rng.random() < PREFIXED:
        text = f"{rng.choice(PREFIXES)} {text}"
    return text + (str(rng.choice(ON)).format(scene.background) if scene.background else "")


class Phrased(Dataset[dict[str, Any]]):
    """Wraps a data set whose captions are names, such as emoji, and phrases each caption at random.

    The phrasing is a function of (seed, draw, index).
    """

    def __init__(self, dataset: Dataset[dict[str, Any]], seed: int = 0) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        draw, index = key if isinstance(key, tuple) else (0, key)
        sample = self.dataset[draw, index]
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index], counter=[0, 0, 0, draw]))
        form, name = str(rng.choice(EMOJI)), sample["caption"]
        return {**sample, "caption": form.format(name, article=with_article(name))}


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _noun(thing: Thing, article: bool, rng: np.random.Generator) -> str:
    if rng.random() < THAT_IS:
        size = f"{thing.size} " if thing.size else ""
        words = f"{size}{thing.shape} that is {thing.color}"
    else:
        words = " ".join(word for word in (thing.size, thing.color, thing.shape) if word)
    return with_article(words) if article else words


def _plural(thing: Thing) -> str:
    return " ".join(word for word in ("two", thing.size, thing.color, f"{thing.shape}s") if word)


def plain_prompts(unseen: Collection[tuple[str, str]] = ()) -> list[str]:
    """Returns "a red circle" and so on for every colour-shape pair that is not in `unseen`."""
    pairs = [(color, shape) for shape in SHAPES for color in HUES if (color, shape) not in unseen]
    return [with_article(f"{color} {shape}") for color, shape in pairs]


_BACKGROUND = re.compile(rf"(?:,| on| with| against)(?: an?)? ({'|'.join((*BACKGROUNDS, 'grey'))})(?: background)?$")
_PREFIX = re.compile(rf"(?:{'|'.join(PREFIXES)}) ")
_JOINTS = {word: relation for relation, words in SYNONYMS.items() for word in words} | dict.fromkeys(UNRELATED)
_JOINT = re.compile(rf" ({'|'.join(sorted(_JOINTS, key=len, reverse=True))}) ")
_SIZE, _COLOR, _SHAPE = (
    f"(?P<{name}>{'|'.join(words)})" for name, words in (("size", RADII), ("color", HUES), ("shape", SHAPES))
)
_NOUN = re.compile(rf"(?:(?:an?|the|one) )?(?:{_SIZE} )?(?:{_COLOR} )?{_SHAPE}(?: that is (?P<said>{'|'.join(HUES)}))?")
_TWINS = re.compile(rf"two (?:{_SIZE} )?{_COLOR} {_SHAPE}s")


def parse(caption: str) -> Scene:
    """Parses a canonical or a freely phrased caption; omitted attributes are None.

    Raises ValueError for any other text.
    """
    text = _PREFIX.sub("", caption.strip().lower().rstrip("."), count=1)
    background = _BACKGROUND.search(text)
    text = text[: background.start()] if background else text
    if match := _TWINS.fullmatch(text):
        thing = Thing(match["color"], match["shape"], match["size"])
        return Scene((thing, thing), None, _level(background))
    names, joint = [text], _JOINT.search(text)
    if joint:
        names = [text[: joint.start()], text[joint.end() :]]
    things = []
    for name in names:
        match = _NOUN.fullmatch(name)
        if match is None or (match["color"] is None) == (match["said"] is None):
            raise ValueError(
                f"'{caption}' does not describe shapes; expected a caption such as 'a red circle on a white background'"
            )
        things.append(Thing(match["color"] or match["said"], match["shape"], match["size"]))
    return Scene(tuple(things), _JOINTS[joint[1]] if joint else None, _level(background))


def _level(background: re.Match[str] | None) -> str | None:
    return None if background is None else background[1].replace("grey", "gray")
