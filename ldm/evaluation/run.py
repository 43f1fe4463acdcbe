"""Samples and measures the images of an evaluation, saving one file per batch so that a kill loses one batch at most.

Images are discarded after measuring, so that memory stays constant. A batch does not depend on the process that
samples it, so that neither a kill nor the number of ranks changes a result.
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

MAX_KEPT_IMAGES = 64  # for the grid


@dataclass(frozen=True)
class EvaluationJob:
    """Samples `count` prompts in batches of `batch`; prompt i has seed `seed` + i, `captions` returns ranges of them.

    Everything else that determines the results must determine the name of `folder`, which belongs to this job only.
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
        """Returns the batches of a rank that are not measured yet."""
        return [ids for ids in self.batches()[rank::world] if not self.file(ids).is_file()]


@dataclass(frozen=True)
class Measured:
    """Features and captions of all images, seconds of sampling, number of network calls, and the first images."""

    rows: Rows
    captions: list[str]
    seconds: float
    calls: int
    images: Tensor


def measure(
    job: EvaluationJob, pipeline: Pipeline, image_metrics: ImageMetrics, rank: int = 0, world: int = 1
) -> Iterator[int]:
    """Samples and measures the unfinished batches of a rank; yields the number of images after each batch."""
    for ids in job.todo(rank, world):
        captions = job.captions(ids)
        start = time.monotonic()
        with counting(pipeline.backbone) as calls:
            seeds = [job.seed + i for i in ids]
            images = pipeline(captions, seeds=seeds, batch_size=len(ids), **asdict(job.settings)).images
        record = {"captions": captions, "seconds": time.monotonic() - start, "calls": calls[0]}
        rows = {**image_metrics.rows(images, captions), "images": images[: max(0, MAX_KEPT_IMAGES - ids.start)]}
        _write(job.file(ids), rows, record)
        yield len(ids)


def collect(job: EvaluationJob) -> Measured:
    """Reads all batches of all ranks, in order. Raises ValueError for a corrupt file."""
    parts, records = zip(*(_read(job.file(ids)) for ids in job.batches()), strict=True)
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    images = rows.pop("images")
    captions = [caption for record in records for caption in record["captions"]]
    return Measured(
        rows, captions, sum(record["seconds"] for record in records), sum(record["calls"] for record in records), images
    )


def _write(path: Path, rows: Rows, record: dict[str, Any]) -> None:
    content = save({name: row.contiguous() for name, row in rows.items()}, {"batch": json.dumps(record)})
    atomic_write(path, lambda file: file.write(content))


def _read(path: Path) -> tuple[Rows, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["batch"])  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt ({error}); delete it and run the same command again") from error
