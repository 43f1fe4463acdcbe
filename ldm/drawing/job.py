"""Runs the sampling jobs of sample.py batch by batch: resumes stopped jobs and splits jobs over processes."""

import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from ldm.device import allow_tf32, device_of_rank, ranks
from ldm.drawing.added_files import AddedFiles, unused_tokens
from ldm.drawing.previews import Previews, gif_path, is_own_gif
from ldm.drawing.prompts import ImageSpec
from ldm.drawing.recorded import LEGACY_SETTINGS
from ldm.drawing.sources import CALL_NAMES, Source
from ldm.image import grid, load_image, read_metadata, save_png, to_pil
from ldm.ownership import is_within
from ldm.pipeline.inputs import ImageRequest
from ldm.pipeline.pipeline import OnStep, Pipeline
from ldm.pipeline.precision import choose_precision, dtype_of
from ldm.pipeline.settings import Settings
from ldm.progress import Progress, clear
from ldm.weights.model import model_fingerprint, open_model

# Together with the settings of a call, these determine an image.
IDENTITY_KEYS = ("fingerprint", "precision", "weak", "init", "mask", "lora", "embedding")
MAX_GRID_IMAGES = 64
CALL_KEYS = ("negative", "strength", *(field.name for field in fields(Settings)))  # arguments of a pipeline's call


@dataclass(frozen=True)
class Process:
    """A process that samples its share of a job's batches, one of those of torchrun or srun, or the only one."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> "Process":
        return cls(*ranks())

    def device(self, name: str) -> str:
        """Assigns each process of a machine its own GPU."""
        return device_of_rank(name, self.local_rank) if self.count > 1 else name


@dataclass(frozen=True)
class SamplingJob:
    """The settings of a sampling job; those that the command line left out are taken from the model."""

    batches: list[list[ImageSpec]]
    call: dict[str, Any]  # arguments of the pipeline's call, for all images
    out: Path
    model: str
    device: str
    precision: str
    weak: str | None = None
    offload: str = "none"
    compile: bool = False
    preview: str | None = None
    position: int | None = None  # position of the only image to write in a single batch; None writes all
    threads: int | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)  # expected of the model and the weak model
    sources: dict[str, Source] = field(default_factory=dict)  # source image and mask
    added: AddedFiles = field(default_factory=AddedFiles)
    lora_dir: str | None = None

    def outputs(self, number: int) -> list[tuple[int, Path]]:
        """Returns the position in the batch and the file of each image to write."""
        if self.position is not None:
            return [(self.position, self.out / file_name(0))]
        first = number * len(self.batches[0])
        return [(k, self.out / file_name(first + k)) for k in range(len(self.batches[number]))]

    @property
    def texts(self) -> list[str]:
        """The prompts and negative prompts that the job names."""
        specs = [spec for batch in self.batches for spec in batch]
        own = [text for spec in specs for text in (spec.prompt, spec.negative) if text is not None]
        return [*own, self.call.get("negative") or ""]

    @property
    def files(self) -> list[Path]:
        return [path for number in range(len(self.batches)) for _, path in self.outputs(number)]


def file_name(index: int) -> str:
    return f"{index:04d}.png"


def run_job(job: SamplingJob) -> None:
    """Writes each image as soon as it is sampled, so that Ctrl-C loses none, and finally the grid.

    Finished batches are skipped; an unfinished batch is sampled completely, so that its images are bit-identical.
    Raises ValueError if the folder holds something else under the name of an image, a GIF or the grid.
    """
    check_sources(job)
    if job.threads:
        torch.set_num_threads(job.threads)  # on the CPU, rounding depends on the number of threads that split a sum
    for warning in unused_tokens(job.added, job.texts):
        warnings.warn(warning, stacklevel=2)
    process = Process.current()
    pipeline, origin = load_pipeline(job, process)
    numbers = range(process.rank, len(job.batches), process.count)
    unfinished = [number for number in numbers if not is_finished(job, number, pipeline, origin)]
    check_grid(job.out)
    check_gifs(job)
    existing = {path for path in job.files if path.exists()}
    if len(unfinished) < len(numbers):
        print(f"{len(numbers) - len(unfinished)} of {len(numbers)} batches are already in {job.out}", file=sys.stderr)
    try:
        for path, image, metadata in sample_batches(job, unfinished, pipeline, process):
            if path not in existing:
                save_new(image, path, metadata | origin)
            clear()
            print(path, flush=True)
    except KeyboardInterrupt:
        clear()
        done = sum(path.exists() for path in job.files)
        print(f"stopped: {done} of {len(job.files)} images are in {job.out}", file=sys.stderr)
        raise
    if all(path.exists() for path in job.files):  # only true in the process that finishes last
        save_grid(job)
        print(job.out / "grid.png")


def sample_batches(
    job: SamplingJob, numbers: list[int], pipeline: Pipeline, process: Process
) -> Iterator[tuple[Path, Image, dict[str, Any]]]:
    """Yields the output images of these batches, with the settings that reproduce them."""
    progress = Progress(1, label=f"process {process.rank}: " if process.count > 1 else "")
    call = job.call | {CALL_NAMES[name]: source.image for name, source in job.sources.items()}
    size = max(map(len, job.batches))
    for k, number in enumerate(numbers):
        batch, outputs = job.batches[number], job.outputs(number)
        previews = Previews(job.preview, outputs[0][0], progress, pipeline.decode_preview)
        result = pipeline(
            [spec.prompt for spec in batch],
            seeds=[spec.seed for spec in batch],
            batch_size=size,
            on_step=step_counter(progress, k, len(numbers)),
            on_estimate=previews.show if job.preview else None,
            **call | per_image_settings(job, batch, pipeline.settings),
        )
        size = result.batch_size  # smaller than before after an out-of-memory error
        for position, path in outputs:
            [image] = to_pil(result.images[position])
            previews.save(position, path, image)
            yield path, image, result.settings[position]


def per_image_settings(job: SamplingJob, batch: list[ImageSpec], settings: Settings) -> dict[str, Any]:
    """Returns the arguments that may differ between the images of a batch."""
    negative, guidance = job.call.get("negative", ""), job.call.get("guidance", settings.guidance)
    return {
        "negative": [negative if spec.negative is None else spec.negative for spec in batch],
        "guidance": [guidance if spec.guidance is None else spec.guidance for spec in batch],
    }


def step_counter(progress: Progress, number: int, batches: int) -> OnStep:
    def on_step(done: int, total: int) -> None:
        progress.total = total * batches
        progress.step(number * total + done - progress.done)

    return on_step


def is_finished(job: SamplingJob, number: int, pipeline: Pipeline, origin: dict[str, Any]) -> bool:
    """Returns whether all outputs of a batch exist. Raises ValueError if one is not an output of this job."""
    batch, own = job.batches[number], per_image_settings(job, job.batches[number], pipeline.settings)
    overrides = {name: job.call[name] for name in job.call.keys() - {"negative", "strength"}}
    outputs = job.outputs(number)
    existing = [(position, path) for position, path in outputs if path.exists()]
    requests = [
        ImageRequest(spec.prompt, own["negative"][k], spec.seed, own["guidance"][k]) for k, spec in enumerate(batch)
    ]
    records = pipeline.records(requests, job.call.get("strength"), **overrides)  # also checks prompts not yet sampled
    for k, path in existing:
        expected = {name: origin.get(name) for name in IDENTITY_KEYS} | {"lora_tags": None} | records[k]
        recorded = recorded_settings(path)
        found = LEGACY_SETTINGS | recorded
        if differing := [name for name, value in json.loads(json.dumps(expected)).items() if found.get(name) != value]:
            values = f" (it has {', '.join(f'{name}={found.get(name)}' for name in differing)})" if recorded else ""
            raise ValueError(
                f"{job.out} already holds {path.name}, which is not an image of this job{values}: "
                "give another out=, or move that image away"
            )
    return len(existing) == len(outputs)


def recorded_settings(path: Path) -> dict[str, Any]:
    """Returns the settings stored in an image, empty if sample.py did not write it."""
    try:
        return read_metadata(path)
    except ValueError:
        return {}


def check_sources(job: SamplingJob) -> None:
    """Raises ValueError if the job would overwrite its own source image or mask."""
    outputs = [*job.files, *map(gif_path, job.files), job.out / "grid.png"]
    for name, source in job.sources.items():
        if any(is_within(path, Path(source.path).expanduser()) for path in outputs):
            raise ValueError(f"{name}={source.path} is a file that this job would write: give another out=")


def check_grid(out: Path) -> None:
    if (out / "grid.png").exists() and "grid" not in recorded_settings(out / "grid.png"):
        raise ValueError(
            f"{out} already holds grid.png, which sample.py did not write: give another out=, or move that image away"
        )


def check_gifs(job: SamplingJob) -> None:
    for path in map(gif_path, job.files if job.preview == "gif" else []):
        if path.exists() and not is_own_gif(path):
            raise ValueError(
                f"{job.out} already holds {path.name}, which sample.py did not write: give another out=, or move that "
                "image away"
            )


def save_new(image: Image, path: Path, metadata: dict[str, Any]) -> None:
    """Raises ValueError if another process has written a different image to `path` in the meantime."""
    if not path.exists():
        save_png(image, path, metadata)
    elif recorded_settings(path) != json.loads(json.dumps(metadata)):
        raise ValueError(f"another process wrote {path} in the meantime: give each job its own out=")


def save_grid(job: SamplingJob) -> None:
    files = job.files[:MAX_GRID_IMAGES]
    metadata = [read_metadata(path) for path in files]
    captions = [f"{settings['prompt']} ({settings['seed']})" for settings in metadata]
    save_png(grid([load_image(path) for path in files], captions), job.out / "grid.png", {"grid": len(files)})


def load_pipeline(job: SamplingJob, process: Process) -> tuple[Pipeline, dict[str, Any]]:
    """Returns the pipeline, and the provenance that determines an image's exact bits besides the call's settings."""
    fingerprint, weak = checked_fingerprint(job, "model"), job.weak and checked_fingerprint(job, "weak")
    device = process.device(job.device)
    precision = choose_precision(job.precision, device)
    allow_tf32(precision != "32")
    pipeline = Pipeline.load(
        job.model,
        device,
        dtype_of(precision),
        job.offload,
        job.weak,
        job.compile,
        **job.added.arguments,
        lora_dir=job.lora_dir,
    )
    return pipeline, {
        "model": job.model,
        "fingerprint": fingerprint,
        **({"guesses": guesses} if (guesses := list(open_model(job.model).guesses)) else {}),
        **({"weak": {"model": job.weak, "fingerprint": weak}} if weak else {}),
        **({"compile": True} if job.compile else {}),
        **{name: source.record for name, source in job.sources.items()},
        **job.added.record,
        **({"lora_dir": job.lora_dir} if job.lora_dir else {}),
        "device": pipeline.device.type,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ldm": ldm_version(),
    }


def checked_fingerprint(job: SamplingJob, key: str) -> str:
    """Returns the fingerprint of a model. Raises ValueError if it differs from the recorded fingerprint."""
    path = getattr(job, key)
    found = model_fingerprint(path)
    if job.fingerprints.get(key) not in (None, found):
        raise ValueError(
            f"{key}={path} has changed since it generated this image: "
            f"set {key}= to the original, or to any other model to sample with that one instead"
        )
    return found


def ldm_version() -> str:
    try:
        return version("ldm")
    except PackageNotFoundError:
        return "not installed"  # run from a checkout
