"""Draws what a page asks for, and keeps it on disk as sample.py does."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from PIL.Image import Image
from torch import Tensor

from ldm.app.models import settings_of
from ldm.commands.sample_job import Job, Process, file_name, load
from ldm.commands.sample_sources import CALLED, read
from ldm.image import save_png, to_pil
from ldm.pipeline import Pipeline, Result
from ldm.sampling.driver import Cancelled
from ldm.settings import Settings


@dataclass(frozen=True)
class Request:
    """A picture a seed; `call` is what else a pipeline takes, `sources` an init and a mask."""

    model: str
    prompt: str
    seeds: list[int]
    call: dict[str, Any]
    sources: dict[str, Image]


@dataclass(frozen=True)
class Step:
    """How far a request has come; `estimates` are small pictures, uint8 (3, h, w), None where there is none yet."""

    done: int
    total: int
    estimates: list[Tensor | None]


@dataclass(frozen=True)
class Drawn:
    paths: list[Path]
    remarks: list[str]


class _Reporter:
    """A pipeline's callbacks as steps."""

    def __init__(self, count: int, tell: Callable[[Step], None], small: Callable[[Tensor], Tensor]) -> None:
        self._small, self._tell = small, tell
        self._at, self._estimates = (0, 0), list[Tensor | None]([None] * count)

    def on_step(self, done: int, total: int) -> None:
        self._at = (done, total)

    def on_estimate(self, first: int, _step: int, x0: Tensor) -> None:
        self._estimates[first : first + len(x0)] = list(self._small(x0))
        self._tell(Step(*self._at, list(self._estimates)))


class Service:
    """One request at a time; the model of the last one stays loaded. Pictures go to the folder `out`."""

    def __init__(
        self, models: dict[str, str], out: Path, device: str = "auto", precision: str = "32", offload: str = "none"
    ) -> None:
        self.models, self.out = models, out
        self._choices: dict[str, Any] = {"device": device, "precision": precision, "offload": offload}
        self._turn = Lock()
        self._loaded: tuple[str, Pipeline, dict[str, Any]] | None = None
        self._count = 0

    def settings(self, model: str) -> Settings:
        return settings_of(self._path(model))

    def draw(self, request: Request, tell: Callable[[Step | Drawn], None], cancelled: Callable[[], bool]) -> None:
        """Tells each step, and at last what was drawn.

        Raises Cancelled, and ValueError for what cannot be drawn.
        """
        with self._turn:
            if cancelled():
                raise Cancelled("cancelled before it began")
            pipeline, origin = self._pipeline(request.model)
            reporter = _Reporter(len(request.seeds), tell, pipeline.small)
            call = request.call | {CALLED[name]: image for name, image in request.sources.items()}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = pipeline(
                    [request.prompt] * len(request.seeds),
                    seeds=request.seeds,
                    batch_size=len(request.seeds),
                    on_step=reporter.on_step,
                    on_estimate=reporter.on_estimate,
                    cancelled=cancelled,
                    **call,
                )
            tell(Drawn(self._kept(result, origin, request.sources), [str(one.message) for one in caught]))

    def _kept(self, result: Result, origin: dict[str, Any], sources: dict[str, Image]) -> list[Path]:
        """Saves the pictures, and beside them what they were drawn from, which they record by path and content."""
        records = {}
        for name, image in sources.items():
            path = self.out / f"{self._count:04d}_{name}.png"
            save_png(image, path, {})
            records[name] = read(name, str(path)).record
        paths = [self.out / file_name(self._count + k) for k in range(len(result.images))]
        for path, image, settings in zip(paths, to_pil(result.images), result.settings, strict=True):
            save_png(image, path, settings | origin | records)
        self._count += len(paths)
        return paths

    def _path(self, model: str) -> str:
        if model not in self.models:
            raise ValueError(f"{model!r} is none of the models of this page; choose one from the list")
        return self.models[model]

    def _pipeline(self, model: str) -> tuple[Pipeline, dict[str, Any]]:
        if self._loaded is None or self._loaded[0] != model:
            path, self._loaded = self._path(model), None  # so that only one takes memory
            job = Job(batches=[], call={}, out=self.out, model=path, **self._choices)
            self._loaded = (model, *load(job, Process()))
        return self._loaded[1:]
