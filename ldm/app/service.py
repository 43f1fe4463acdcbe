"""Draws what a page asks for, and keeps it on disk as sample.py does."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any

from PIL.Image import Image
from torch import Tensor

from ldm.app.models import settings_of
from ldm.drawing.job import Process, SamplingJob, file_name, load_pipeline
from ldm.drawing.sources import CALL_NAMES, read
from ldm.image import save_png, to_pil
from ldm.pipeline.pipeline import Pipeline, Result
from ldm.pipeline.settings import Settings


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
    """How far a request has come, with small pictures of where it leads to."""

    done: int
    total: int
    estimates: list[Image]


@dataclass(frozen=True)
class Drawn:
    paths: list[Path]
    remarks: list[str]


class Service:
    """One request at a time; the model of the last one stays loaded.

    Pictures go to the folder `out`, under numbers that are free there.
    """

    def __init__(
        self, models: dict[str, str], out: Path, device: str = "auto", precision: str = "auto", offload: str = "none"
    ) -> None:
        self.models, self.out = models, out
        self._choices: dict[str, Any] = {"device": device, "precision": precision, "offload": offload}
        self._turn = Lock()
        self._loaded: tuple[str, Pipeline, dict[str, Any]] | None = None
        self._count = 0

    def settings(self, model: str) -> Settings:
        return settings_of(self._path(model))

    def draw(self, request: Request) -> Generator[Step | Drawn, None, None]:
        """Each step while it is drawn, then what was drawn; to close it ends the drawing after its current step.

        Raises ValueError for what cannot be drawn.
        """
        told: SimpleQueue[Step | Drawn | None] = SimpleQueue()
        closed = Event()
        with ThreadPoolExecutor(1) as thread:
            work = thread.submit(self._draw, request, told.put, closed.is_set)
            work.add_done_callback(lambda _: told.put(None))
            try:
                while (one := told.get()) is not None:
                    yield one
                work.result()
            finally:
                closed.set()

    def _draw(self, request: Request, tell: Callable[[Step | Drawn], None], cancelled: Callable[[], bool]) -> None:
        estimates: dict[int, Image] = {}
        remarks: list[str] = []
        progress = (0, 0)

        def on_step(done: int, total: int) -> None:
            nonlocal progress
            progress = done, total

        def on_estimate(first: int, _step: int, x0: Tensor) -> None:
            estimates.update(enumerate(to_pil(pipeline.decode_preview(x0)), first))
            tell(Step(*progress, list(estimates.values())))

        with self._turn:
            pipeline, origin = self._pipeline(request.model)
            result = pipeline(
                [request.prompt] * len(request.seeds),
                seeds=request.seeds,
                batch_size=len(request.seeds),
                on_step=on_step,
                on_estimate=on_estimate,
                on_warning=remarks.append,
                cancelled=cancelled,
                **request.call | {CALL_NAMES[name]: image for name, image in request.sources.items()},
            )
            tell(Drawn(self._kept(result, origin, request.sources), remarks))

    def _kept(self, result: Result, origin: dict[str, Any], sources: dict[str, Image]) -> list[Path]:
        """Saves the pictures, and beside them what they were drawn from, which they record by path and content."""
        records = {}
        while any(path.exists() for path in self._files(len(result.images))):
            self._count += 1
        for name, image in sources.items():
            path = self._source_file(name)
            save_png(image, path, {})
            records[name] = read(name, str(path)).record
        paths = self._pictures(len(result.images))
        for path, image, settings in zip(paths, to_pil(result.images), result.settings, strict=True):
            save_png(image, path, settings | origin | records)
        self._count += len(paths)
        return paths

    def _source_file(self, name: str) -> Path:
        return self.out / f"{self._count:04d}_{name}.png"

    def _files(self, pictures: int) -> list[Path]:
        """What the next request of so many pictures may write."""
        return [*self._pictures(pictures), *map(self._source_file, CALL_NAMES)]

    def _pictures(self, count: int) -> list[Path]:
        return [self.out / file_name(self._count + k) for k in range(count)]

    def _path(self, model: str) -> str:
        if model not in self.models:
            raise ValueError(f"{model!r} is none of the models of this page; choose one from the list")
        return self.models[model]

    def _pipeline(self, model: str) -> tuple[Pipeline, dict[str, Any]]:
        if self._loaded is None or self._loaded[0] != model:
            path, self._loaded = self._path(model), None  # so that only one takes memory
            job = SamplingJob(batches=[], call={}, out=self.out, model=path, **self._choices)
            self._loaded = (model, *load_pipeline(job, Process()))
        return self._loaded[1:]
