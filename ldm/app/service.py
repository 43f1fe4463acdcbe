"""Samples the images that a page requests and saves them in the format of sample.py."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any

from PIL.Image import Image
from torch import Tensor

from ldm.app.adapters import AdapterFiles
from ldm.app.models import default_settings, examples
from ldm.drawing.added_files import AddedFiles
from ldm.drawing.job import Process, SamplingJob, file_name, load_pipeline
from ldm.drawing.keys import ADDED
from ldm.drawing.sources import CALL_NAMES, read
from ldm.image import save_png, to_pil
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.result import Result
from ldm.pipeline.settings import Settings


@dataclass(frozen=True)
class Request:
    """One image per seed. `call` holds further arguments of the pipeline, `sources` an init and a mask.

    `loras` are names of adapter files with their weights, `embeddings` names of textual inversions.
    """

    model: str
    prompt: str
    seeds: list[int]
    call: dict[str, Any]
    sources: dict[str, Image]
    loras: list[tuple[str, float]] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """The progress of a request, with small images of the current estimates."""

    done: int
    total: int
    estimates: list[Image]


@dataclass(frozen=True)
class Finished:
    paths: list[Path]
    warnings: list[str]


class Service:
    """Runs one request at a time and keeps the last model loaded, and the adapters in it.

    Saves images in the folder `out`, under numbers that are unused there. `lora_dir` is the folder of LoRA files and
    textual inversions that requests and the tags of prompts may name.
    """

    def __init__(
        self,
        models: dict[str, str],
        out: Path,
        device: str = "auto",
        precision: str = "auto",
        offload: str = "none",
        lora_dir: str | None = None,
    ) -> None:
        self.models, self.out, self.lora_dir = models, out, lora_dir
        self.adapters = AdapterFiles(lora_dir, out / "dropped")
        self._choices: dict[str, Any] = {"device": device, "precision": precision, "offload": offload}
        self._lock = Lock()
        self._loaded: tuple[str, Pipeline, dict[str, Any]] | None = None
        self._count = 0

    def settings(self, model: str) -> Settings:
        return default_settings(self._path(model))

    def examples(self, model: str) -> list[str]:
        return examples(self._path(model))

    def sample(self, request: Request) -> Generator[Step | Finished, None, None]:
        """Yields each step, then the saved images; closing the generator stops sampling after the current step.

        Raises ValueError for an invalid request.
        """
        events: SimpleQueue[Step | Finished | None] = SimpleQueue()
        closed = Event()
        with ThreadPoolExecutor(1) as thread:
            work = thread.submit(self._sample, request, events.put, closed.is_set)
            work.add_done_callback(lambda _: events.put(None))
            try:
                while (event := events.get()) is not None:
                    yield event
                work.result()
            finally:
                closed.set()

    def _sample(
        self, request: Request, report: Callable[[Step | Finished], None], cancelled: Callable[[], bool]
    ) -> None:
        estimates: dict[int, Image] = {}
        warnings: list[str] = []
        progress = (0, 0)

        def on_step(done: int, total: int) -> None:
            nonlocal progress
            progress = done, total

        def on_estimate(first: int, _step: int, x0: Tensor) -> None:
            estimates.update(enumerate(to_pil(pipeline.decode_preview(x0)), first))
            report(Step(*progress, list(estimates.values())))

        with self._lock:
            added = self.adapters.chosen(request.loras, request.embeddings)
            pipeline, origin = self._pipeline(request.model, added)
            result = pipeline(
                [request.prompt] * len(request.seeds),
                seeds=request.seeds,
                batch_size=len(request.seeds),
                on_step=on_step,
                on_estimate=on_estimate,
                on_warning=warnings.append,
                cancelled=cancelled,
                **request.call | {CALL_NAMES[name]: image for name, image in request.sources.items()},
            )
            report(Finished(self._save(result, origin, request.sources), warnings))

    def _save(self, result: Result, origin: dict[str, Any], sources: dict[str, Image]) -> list[Path]:
        """Saves the images, and beside them their source image and mask, which they record by path and SHA-256."""
        records = {}
        while any(path.exists() for path in self._files(len(result.images))):
            self._count += 1
        for name, image in sources.items():
            path = self._source_file(name)
            save_png(image, path, {})
            records[name] = read(name, str(path)).record
        paths = self._images(len(result.images))
        for path, image, settings in zip(paths, to_pil(result.images), result.settings, strict=True):
            save_png(image, path, settings | origin | records)
        self._count += len(paths)
        return paths

    def _source_file(self, name: str) -> Path:
        return self.out / f"{self._count:04d}_{name}.png"

    def _files(self, count: int) -> list[Path]:
        """Returns the files that the next request, of `count` images, may write."""
        return [*self._images(count), *map(self._source_file, CALL_NAMES)]

    def _images(self, count: int) -> list[Path]:
        return [self.out / file_name(self._count + k) for k in range(count)]

    def _path(self, model: str) -> str:
        if model not in self.models:
            raise ValueError(f"{model!r} is not among the models of this page; choose one from the list")
        return self.models[model]

    def _pipeline(self, model: str, added: AddedFiles) -> tuple[Pipeline, dict[str, Any]]:
        """Returns the pipeline with these adapters and textual inversions, and the origin of its images."""
        if self._loaded is None or self._loaded[0] != model or self._loaded[1].outdated:
            path, self._loaded = self._path(model), None  # frees the previous model first
            job = SamplingJob([], {}, self.out, path, added=added, lora_dir=self.lora_dir, **self._choices)
            self._loaded = (model, *load_pipeline(job, Process()))
        _, pipeline, origin = self._loaded
        pipeline.use(**added.arguments)
        return pipeline, {name: value for name, value in origin.items() if name not in ADDED} | added.record
