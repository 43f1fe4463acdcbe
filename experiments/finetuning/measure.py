"""Measures what a fine-tuned model has learned and what it has forgotten, prompt by prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product
from typing import Any

import torch
from torch import Tensor

from experiments.finetuning.concepts import CONCEPTS, PLACES, SINGLES, Concept
from ldm.data.sources.phrasing import parse, plain_prompts
from ldm.data.sources.scene import RADII, Scene, Thing
from ldm.data.sources.shapes import held_out_prompts
from ldm.metrics.composition import DATA, Known, compare, see
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.settings import Settings

HELD_OUT = 80
COLUMNS = 12  # images in a row of the grid


@dataclass(frozen=True)
class Prompts:
    """Prompts, the scenes that they mean, and what the checker must recognise."""

    texts: list[str]
    scenes: list[Scene]
    known: Known

    def first(self, count: int | None) -> "Prompts":
        return Prompts(self.texts[:count], self.scenes[:count], self.known)


def old_prompts() -> Prompts:
    """Returns every colour and shape with no more than an article, and canonical captions of held-out scenes."""
    texts = [*plain_prompts(), *held_out_prompts(HELD_OUT)]
    return Prompts(texts, [parse(text) for text in texts], DATA)


def new_prompts(concept: Concept, scenes: Sequence[Scene], word: str) -> Prompts:
    return Prompts([concept.caption(scene, word) for scene in scenes], list(scenes), concept.known)


def shape_in_colour() -> Prompts:
    """Returns prompts of the new shape in the new colour, for two adapters at once."""
    shape, colour = CONCEPTS["shape"], CONCEPTS["colour"]
    sized = product((None, *RADII), PLACES)
    both = [Scene((Thing(colour.name, shape.name, size),), None, place) for size, place in sized]
    scenes = list(islice(cycle(both), SINGLES // 2))
    texts = [shape.caption(scene, shape.word).replace(f" {colour.name} ", f" {colour.word} ") for scene in scenes]
    return Prompts(texts, scenes, Known(shape.known.shapes, colour.known.hues))


def concept_prompts(name: str, word: str) -> dict[str, Prompts]:
    concept = CONCEPTS[name]
    return {
        f"{name}/singles": new_prompts(concept, concept.singles, word),
        f"{name}/pairs": new_prompts(concept, concept.pairs, word),
    }


@dataclass(frozen=True)
class Measure:
    """Samples with the base's sampler, in `steps` steps, image k of a set with seed k; `limit` is for rehearsals."""

    settings: Settings
    steps: int
    limit: int | None = None

    def __call__(self, pipeline: Pipeline, sets: Mapping[str, Prompts]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns for each set which images are right, as a string of 0 and 1, and their images."""
        chosen = {name: prompts.first(self.limit) for name, prompts in sets.items()}
        texts = [text for prompts in chosen.values() for text in prompts.texts]
        seeds = [seed for prompts in chosen.values() for seed in range(len(prompts.texts))]
        base = self.settings
        made = pipeline(
            texts,
            seeds=seeds,
            guidance=base.guidance,
            batch_size=40,
            steps=self.steps,
            sampler=base.sampler,
            spacing=base.spacing,
            on_warning=lambda _: None,  # that the text encoder does not know a placeholder
        ).images
        images = dict(zip(chosen, made.split([len(prompts.texts) for prompts in chosen.values()]), strict=True))
        return {name: right(images[name], prompts) for name, prompts in chosen.items()}, images


def right(images: Tensor, prompts: Prompts) -> str:
    """Returns for each image 1 if all of it is right, otherwise 0."""
    found = see(images, prompts.known)
    return "".join(str(int(compare(one, scene).ok)) for one, scene in zip(found, prompts.scenes, strict=True))


def shown(images: Mapping[str, Tensor]) -> Tensor:
    """Returns as many images of each set for a row of the grid."""
    count = COLUMNS // len(images)
    return torch.cat([own[torch.linspace(0, len(own) - 1, count).round().long()] for own in images.values()])
