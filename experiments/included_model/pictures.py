"""Generates the images of the README: python -m experiments.included_model.pictures [MODEL]."""

import sys
from pathlib import Path

from PIL import Image

from ldm.image import grid
from ldm.inside.film_strip import film_strip
from ldm.pipeline.pipeline import Pipeline

IMAGES = Path(__file__).parents[2] / "docs" / "images"
PROMPTS = (
    "a red circle",
    "a green star next to an orange square",
    "a pink ring above a blue triangle on a black background",
    "two yellow diamonds",
    "a cat face",
    "a red heart",
    "a slice of pizza",
    "a hedgehog",
    "a violin",
    "a christmas tree",
    "a fire engine",
    "a ladybug",
)
COLUMNS, SCALE = 6, 2
FILM = "a green star next to an orange square"
TOUR, SEEDS = "a green star above an orange circle on a white background", (7, 8, 9, 10)  # as in the README's command


def enlarged(images: list[Image.Image]) -> Image.Image:
    larger = [image.resize((SCALE * image.width, SCALE * image.height), Image.Resampling.LANCZOS) for image in images]
    return grid(larger, columns=COLUMNS)


def main() -> None:
    pipeline = Pipeline.load(sys.argv[1] if len(sys.argv) > 1 else "shapes")
    enlarged(pipeline(list(PROMPTS), seeds=[1] * len(PROMPTS)).pil).save(IMAGES / "samples.png")
    enlarged(pipeline([TOUR] * len(SEEDS), seeds=list(SEEDS)).pil).save(IMAGES / "tour.png")
    film_strip(pipeline, FILM).save(IMAGES / "film.png")


if __name__ == "__main__":
    main()
