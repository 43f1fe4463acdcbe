"""Drawing and measuring many prompts, so that a kill costs a batch: what was measured of each is a file of its own.

Pictures are not kept, so memory does not grow with them; and a batch is the same whoever draws it, so neither a kill
nor the number of ranks changes a number.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.files import atomic_write
from ldm.metrics.measure import ImageMetrics, Rows, counting
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.settings import Settings

SHOWN = 64  # pictures that are kept, to be looked at


@dataclass(frozen=True)
class EvaluationJob:
    """`count` prompts, of which `captions` gives any range, drawn `batch` at a time; the i-th with `seed` + i.

    `folder` is this job's alone: whatever else decides its numbers must decide the folder's name.
    """

    folder: Path
    captions: Callable[[range], list[str]]
    count: int
    batch: int
    seed: int
    settings: Settings

    def batches(self) -> list[range]:
        return [range(k, min(k + self.batch, self.count)) for k in range(0, self.count, self.batch)]

    def file(self, ids: range) -> Path:
        return self.folder / f"{ids.start:08}.safetensors"

    def todo(self, rank: int = 0, world: int = 1) -> list[range]:
        """The rank's batches that are not measured yet."""
        return [ids for ids in self.batches()[rank::world] if not self.file(ids).is_file()]


@dataclass(frozen=True)
class Measured:
    """Of all pictures: rows, captions, seconds of drawing and network calls; and the first pictures themselves."""

    rows: Rows
    captions: list[str]
    seconds: float
    calls: int
    images: Tensor


def measure(
    job: EvaluationJob, pipeline: Pipeline, image_metrics: ImageMetrics, rank: int = 0, world: int = 1
) -> Iterator[int]:
    """Draws and measures the rank's batches that are to do; gives the number of pictures of each when it is done."""
    for ids in job.todo(rank, world):
        captions = job.captions(ids)
        began = time.monotonic()
        with counting(pipeline.backbone) as calls:
            seeds = [job.seed + i for i in ids]
            images = pipeline(captions, seeds=seeds, batch_size=len(ids), **asdict(job.settings)).images
        told = {"captions": captions, "seconds": time.monotonic() - began, "calls": calls[0]}
        rows = {**image_metrics.rows(images, captions), "images": images[: max(0, SHOWN - ids.start)]}
        _write(job.file(ids), rows, told)
        yield len(ids)


def collect(job: EvaluationJob) -> Measured:
    """All batches in their order, whoever drew them. Raises ValueError for a damaged file."""
    parts, told = zip(*(_read(job.file(ids)) for ids in job.batches()), strict=True)
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    images = rows.pop("images")
    captions = [caption for one in told for caption in one["captions"]]
    return Measured(rows, captions, sum(one["seconds"] for one in told), sum(one["calls"] for one in told), images)


def _write(path: Path, rows: Rows, told: dict[str, Any]) -> None:
    content = save({name: row.contiguous() for name, row in rows.items()}, {"batch": json.dumps(told)})
    atomic_write(path, lambda file: file.write(content))


def _read(path: Path) -> tuple[Rows, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["batch"])  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the same command again") from error
