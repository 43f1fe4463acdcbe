"""Metadata and a tiny Stable Diffusion for a rehearsal, with what must become of each row."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.robustness.filter.row_by_row import Expected, expect
from ldm.metadata.rules import Thresholds
from ldm.weights.convert import write
from tests.weights.foreign import full_model

ROWS = 2000
CUTS = Thresholds(6.5, 0.28, 512, 0.5, 2.0, 0.5, "UNLIKELY", 0.5, None, 20, 300, None, None, True)
# Kinds of responses of tests/data/web.py: those that become an image, those that are refused while they are downloaded,
# and those that are complete, but no image.
IMAGES = ("good", "large", "moved")
FAILING = ("missing", "failing", "silent", "trickle", "endless", "short", "empty", "circle", "garbage", "private")
UNREADABLE = ("cut", "page")
WORDS = ("red", "blue", "green", "small", "large", "round", "bright", "cat", "dog", "house", "tree", "lake", "boat")
MODEL: dict[str, dict[str, Any]] = {  # the layout of Stable Diffusion 1.5 with its f = 8, tiny
    "unet": {
        "width": 32,
        "multipliers": (1, 2),
        "blocks": 1,
        "depth": (1, 1),
        "heads": 2,
        "context_width": 32,
        "groups": 8,
    },
    "vae": {"widths": (8, 8, 16, 16), "blocks": 1, "groups": 4},
    "text_tower": {"width": 32, "layers": 1, "heads": 2},
}


def write_model(path: Path) -> None:
    """Writes a complete model with random weights as a diffusers folder."""
    write(full_model(MODEL, size=[64, 64]), path, "diffusers")


def write_metadata(folder: Path, web: str, rng: random.Random) -> tuple[Expected, Counter[str]]:
    """Writes two parquet files with different column names.

    Returns what the filter must keep and reject, and the number of kept rows by the kind of response.
    """
    folder.mkdir(parents=True)
    rows = [_row(web, number, rng) for number in range(ROWS)]
    half = ROWS // 2
    _write(folder / "a.parquet", rows[:half], {})
    names = {"url": "url", "caption": "caption", "width": "original_width", "height": "original_height"}
    _write(folder / "b.parquet", rows[half:], names | {"aesthetic": "aesthetic"})
    found = expect(rows, CUTS, has_nsfw=False)
    return found, Counter(rows[place]["url"].split(b"/")[3].decode() for place in found.kept)


def _row(web: str, number: int, rng: random.Random) -> dict[str, Any]:
    kind = "good" if rng.random() < 0.8 else rng.choice(IMAGES + FAILING + UNREADABLE)
    name = number if rng.random() > 0.03 else rng.randrange(number + 1)  # some addresses are repeated
    return {
        "url": f"{web}/{kind}/{name}.jpg".encode(),
        "caption": " ".join(rng.choices(WORDS, k=rng.randrange(3, 16))).encode(),
        "width": rng.choice([300, 512, 640, 640, 800, 1024, 1024, 1280]),
        "height": rng.choice([512, 640, 1024]),
        "similarity": 0.2 if rng.random() < 0.1 else None if rng.random() < 0.01 else rng.uniform(0.25, 0.4),
        "punsafe": 0.5 if rng.random() < 0.05 else rng.uniform(0, 0.5),
        "pwatermark": 0.9 if rng.random() < 0.1 else rng.uniform(0, 0.5),
        "aesthetic": 6.0 if rng.random() < 0.1 else math.nan if rng.random() < 0.01 else rng.uniform(6.4, 8),
    }


def _write(path: Path, rows: Sequence[dict[str, Any]], names: dict[str, str]) -> None:
    names = {
        "url": "URL",
        "caption": "TEXT",
        "width": "WIDTH",
        "height": "HEIGHT",
        "aesthetic": "AESTHETIC_SCORE",
    } | names
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        kind = (
            pa.string() if name in ("url", "caption") else pa.int64() if name in ("width", "height") else pa.float32()
        )
        columns[names.get(name, name)] = pa.array(values, kind)
    pq.write_table(pa.table(columns), path, row_group_size=200)
