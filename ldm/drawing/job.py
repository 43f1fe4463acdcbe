"""Drawing a job of sample.py: batch by batch, going on where an earlier process was stopped, split over processes."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from ldm.device import DTYPES, choose_precision
from ldm.drawing.added_files import AddedFiles
from ldm.drawing.previews import Previews, film_of, is_film
from ldm.drawing.prompts import Picture
from ldm.drawing.sources import CALLED, Source
from ldm.files import leftovers
from ldm.image import grid, load_image, read_metadata, save_png, to_pil
from ldm.ownership import is_within
from ldm.pipeline.inputs import Item
from ldm.pipeline.pipeline import OnStep, Pipeline
from ldm.pipeline.settings import Settings
from ldm.progress import Progress, clear
from ldm.weights.model import model_fingerprint

# How pictures were drawn that do not record these.
UNRECORDED: dict[str, Any] = {
    "fixed_steps": False,
    "sampler_options": {},
    "spacing_options": {},
    "guidance_interval": None,
    "guidance_rescale": 0.0,
    "thresholding": "none",
    "thresholding_options": {},
    "clip_skip": 0,
    "chunks": 1,
    "tile": 0,
    "noise": "ldm",
    "strength": None,
    "weak": None,
    "compile": False,
    "init": None,
    "mask": None,
    "lora": None,
    "embedding": None,
}
DECISIVE = (
    "fingerprint",
    "precision",
    "weak",
    "init",
    "mask",
    "lora",
    "embedding",
)  # besides the settings, but for rounding
GRID_MOST = 64
CALL = ("negative", "strength", *(field.name for field in fields(Settings)))  # the keys that a pipeline's call takes


@dataclass(frozen=True)
class Process:
    """One of several that torchrun started, which share a job's batches, or the only one."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> "Process":
        environment = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)
        return cls(*(int(os.environ.get(name, default)) for name, default in environment))

    def device(self, name: str) -> str:
        """Each process of a machine has a GPU of its own."""
        own = self.count > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if own else name


@dataclass(frozen=True)
class Job:
    """What to draw, all choices made but those that the model makes."""

    batches: list[list[Picture]]
    call: dict[str, Any]  # of the pipeline, for all pictures
    out: Path
    model: str
    device: str
    precision: str
    weak: str | None = None
    offload: str = "none"
    compile: bool = False
    preview: str | None = None
    keep: int | None = None  # the only position of the only batch that is wanted
    threads: int | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)  # that the model and the weak one must have
    sources: dict[str, Source] = field(default_factory=dict)  # the pictures to start from
    added: AddedFiles = field(default_factory=AddedFiles)

    def wanted(self, number: int) -> list[tuple[int, Path]]:
        """Positions in a batch, and the files that they become."""
        if self.keep is not None:
            return [(self.keep, self.out / file_name(0))]
        first = number * len(self.batches[0])
        return [(k, self.out / file_name(first + k)) for k in range(len(self.batches[number]))]

    @property
    def files(self) -> list[Path]:
        return [path for number in range(len(self.batches)) for _, path in self.wanted(number)]


def file_name(index: int) -> str:
    return f"{index:04d}.png"


def draw(job: Job) -> None:
    """Writes pictures as soon as they are drawn, so that Ctrl-C loses none, and at the end the grid.

    Batches with nothing left to draw are left out; one that is drawn is drawn whole, so that its bits are the same.
    Raises ValueError where the folder holds something else under the name of a picture, a film or the grid.
    """
    check_sources(job)
    if job.threads:
        torch.set_num_threads(job.threads)  # on the CPU, sums are split among threads and round accordingly
    process = Process.here()
    pipeline, origin = load(job, process)
    numbers = range(process.rank, len(job.batches), process.count)
    left = [number for number in numbers if not finished(job, number, pipeline, origin)]
    check_grid(job.out)
    check_films(job)
    clean(job, left)
    there = {path for path in job.files if path.exists()}
    if len(left) < len(numbers):
        print(f"{len(numbers) - len(left)} of {len(numbers)} batches are in {job.out} already", file=sys.stderr)
    try:
        for path, image, metadata in pictures(job, left, pipeline, process):
            if path not in there:
                save_new(image, path, metadata | origin)
            clear()
            print(path, flush=True)
    except KeyboardInterrupt:
        clear()
        done = sum(path.exists() for path in job.files)
        print(f"stopped: {done} of {len(job.files)} pictures are in {job.out}", file=sys.stderr)
        raise
    if all(path.exists() for path in job.files):  # of several processes the last one sees this
        save_grid(job)
        print(job.out / "grid.png")


def pictures(
    job: Job, numbers: list[int], pipeline: Pipeline, process: Process
) -> Iterator[tuple[Path, Image, dict[str, Any]]]:
    """The wanted pictures of these batches, with the settings that draw them again."""
    progress = Progress(1, label=f"process {process.rank}: " if process.count > 1 else "")
    call = job.call | {CALLED[name]: source.image for name, source in job.sources.items()}
    size = max(map(len, job.batches))
    for k, number in enumerate(numbers):
        batch, wanted = job.batches[number], job.wanted(number)
        previews = Previews(job.preview, wanted[0][0], progress, pipeline.small)
        result = pipeline(
            [picture.prompt for picture in batch],
            seeds=[picture.seed for picture in batch],
            batch_size=size,
            on_step=counter(progress, k, len(numbers)),
            on_estimate=previews.show if job.preview else None,
            **call | own(job, batch, pipeline.settings),
        )
        size = min(size, max(len(one["batch"]["seeds"]) for one in result.settings))  # what memory sufficed for
        for position, path in wanted:
            [image] = to_pil(result.images[position])
            previews.save(position, path, image)
            yield path, image, result.settings[position]


def own(job: Job, batch: list[Picture], settings: Settings) -> dict[str, Any]:
    """What each picture of a batch may have for itself."""
    negative, guidance = job.call.get("negative", ""), job.call.get("guidance", settings.guidance)
    return {
        "negative": [negative if one.negative is None else one.negative for one in batch],
        "guidance": [guidance if one.guidance is None else one.guidance for one in batch],
    }


def counter(progress: Progress, number: int, batches: int) -> OnStep:
    def on_step(done: int, total: int) -> None:
        progress.total = total * batches
        progress.step(number * total + done - progress.done)

    return on_step


def finished(job: Job, number: int, pipeline: Pipeline, origin: dict[str, Any]) -> bool:
    """Whether all that is wanted of a batch is there, drawn as this job would."""
    batch, each = job.batches[number], own(job, job.batches[number], pipeline.settings)
    settings = pipeline.settings.changed({name: job.call[name] for name in job.call.keys() - {"negative", "strength"}})
    there = [(position, path) for position, path in job.wanted(number) if path.exists()]
    for k, path in there:
        item = Item(batch[k].prompt, each["negative"][k], batch[k].seed, each["guidance"][k])
        expected = settings.record(item, job.call.get("strength")) | {name: origin.get(name) for name in DECISIVE}
        held = recorded(path)
        found = UNRECORDED | held
        if other := [name for name, value in json.loads(json.dumps(expected)).items() if found.get(name) != value]:
            told = f" (there: {', '.join(f'{name}={found.get(name)}' for name in other)})" if held else ""
            raise ValueError(
                f"{job.out} already holds {path.name}, which is not of this job{told}: "
                "give another folder, or move that picture away"
            )
    return len(there) == len(job.wanted(number))


def recorded(path: Path) -> dict[str, Any]:
    """The settings of a picture, none if sample.py did not write it."""
    try:
        return read_metadata(path)
    except ValueError:
        return {}


def clean(job: Job, numbers: Iterable[int]) -> None:
    """Removes what a process that was killed had begun to write of these batches."""
    names = {path.name for number in numbers for _, path in job.wanted(number)}
    for path in leftovers(job.out, names.__contains__):
        path.unlink(missing_ok=True)


def check_sources(job: Job) -> None:
    """Raises ValueError where a picture that the job starts from is one that it would write."""
    outputs = [*job.files, *map(film_of, job.files), job.out / "grid.png"]
    for name, source in job.sources.items():
        if any(is_within(path, Path(source.path).expanduser()) for path in outputs):
            raise ValueError(f"{name}={source.path} is a file that this job would write: give another out=")


def check_grid(out: Path) -> None:
    if (out / "grid.png").exists() and "grid" not in recorded(out / "grid.png"):
        raise ValueError(f"{out} already holds another grid.png: give another folder, or move that picture away")


def check_films(job: Job) -> None:
    for path in map(film_of, job.files if job.preview == "gif" else []):
        if path.exists() and not is_film(path):
            raise ValueError(
                f"{job.out} already holds {path.name}, which sample.py did not write: give another folder, or move it "
                "away"
            )


def save_new(image: Image, path: Path, metadata: dict[str, Any]) -> None:
    """Raises ValueError for another picture that appeared there while this one was drawn."""
    if not path.exists():
        save_png(image, path, metadata)
    elif recorded(path) != json.loads(json.dumps(metadata)):
        raise ValueError(f"another process wrote {path} meanwhile: give each job its own out=")


def save_grid(job: Job) -> None:
    shown = job.files[:GRID_MOST]
    told = [read_metadata(path) for path in shown]
    captions = [f"{one['prompt']} ({one['seed']})" for one in told]
    save_png(grid([load_image(path) for path in shown], captions), job.out / "grid.png", {"grid": len(shown)})


def load(job: Job, process: Process) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline, and what besides the settings of a call decides a picture's every bit."""
    fingerprint, weak = fingerprint_as_recorded(job, "model"), job.weak and fingerprint_as_recorded(job, "weak")
    device = process.device(job.device)
    precision = choose_precision(job.precision, device)
    pipeline = Pipeline.load(
        job.model, device, DTYPES[precision], job.offload, job.weak, job.compile, **job.added.arguments
    )
    return pipeline, {
        "model": job.model,
        "fingerprint": fingerprint,
        **({"weak": {"model": job.weak, "fingerprint": weak}} if weak else {}),
        **({"compile": True} if job.compile else {}),
        **{name: source.record for name, source in job.sources.items()},
        **job.added.record,
        "device": pipeline.device.type,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ldm": ldm_version(),
    }


def fingerprint_as_recorded(job: Job, key: str) -> str:
    """Raises ValueError if it is no longer the one that drew the picture to draw again."""
    path = getattr(job, key)
    found = model_fingerprint(path)
    if job.fingerprints.get(key) not in (None, found):
        raise ValueError(
            f"{key}={path} is no longer the one that drew this picture; "
            f"give {key}= the right one, or another to draw it with that"
        )
    return found


def ldm_version() -> str:
    try:
        return version("ldm")
    except PackageNotFoundError:
        return "not installed"  # run from a checkout
