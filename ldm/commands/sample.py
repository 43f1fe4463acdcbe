"""`sample.py`: prompts → PNGs that say how they were made."""

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from ldm.commands import edge
from ldm.commands.edge import UsageError
from ldm.commands.sample_arguments import Arguments, help_text, parse
from ldm.commands.sample_sources import CALLED, Source, sources_of
from ldm.editing import STRENGTH, steps_walked
from ldm.image import grid, read_metadata, save_png, to_pil
from ldm.pipeline import Pipeline
from ldm.progress import Progress, clear
from ldm.sampling.driver import SAMPLERS
from ldm.sampling.spacing import SPACINGS
from ldm.weights.find import DEFAULT
from ldm.weights.model import read_model

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
CALL = (
    "negative",
    "steps",
    "sampler",
    "spacing",
    "sampler_options",
    "spacing_options",
    "guidance",
    "guidance_interval",
    "guidance_rescale",
    "strength",
    "size",
    "clip_skip",
    "chunks",
    "tile",
)  # the keys that a pipeline's call takes
OPTIONS: dict[str, Any] = {"sampler_options": {}, "spacing_options": {}}
GUIDANCE: dict[str, Any] = {"guidance_interval": None, "guidance_rescale": 0.0}
# How pictures were drawn that do not record these.
UNRECORDED = {"clip_skip": 0, "chunks": 1, "tile": 0, "strength": None} | OPTIONS | GUIDANCE
GRID_MOST = 64


@dataclass(frozen=True)
class Job:
    """What to draw, all choices made but those that the model makes."""

    batches: list[tuple[list[str], list[int]]]  # prompts and seeds
    call: dict[str, Any]
    out: Path
    model: str
    device: str
    precision: str
    keep: int | None = None  # the only position of the batch that is wanted
    threads: int | None = None
    fingerprint: str | None = None  # of the model that it takes
    sources: dict[str, Source] = field(default_factory=dict)  # the pictures to start from

    @property
    def total(self) -> int:
        """How many pictures are wanted."""
        return sum(len(prompts) for prompts, _ in self.batches) if self.keep is None else 1


def main(argv: list[str]) -> int:
    """Draws what the arguments say and returns the exit code."""
    return edge.run(lambda: work(argv), debug="--debug" in argv)


def work(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.help:
        print(help_text())
        return
    for name, known in (("sampler", SAMPLERS), ("spacing", SPACINGS)):
        if (value := arguments.given.get(name)) not in (None, *known):
            raise UsageError(f"{name}={value} was given, but {name} must be one of {', '.join(known)}")
    job = again(arguments) if "from" in arguments.given else fresh(arguments)
    with shown_warnings():
        draw(job)


def fresh(arguments: Arguments) -> Job:
    """The job that prompts describe: every prompt with seeds `seed` … `seed` + n - 1, in order."""
    given = arguments.given
    prompts = arguments.prompts + (read_prompts(given["prompts_file"]) if "prompts_file" in given else [])
    if not prompts:
        raise UsageError('there is no prompt; write one, as in: python sample.py "a red circle on a white background"')
    seed, n, size = given.get("seed", 0), given.get("n", 1), given.get("batch_size", 8)
    pairs = [(prompt, seed + k) for prompt in prompts for k in range(n)]
    chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return Job(
        batches=[([p for p, _ in chunk], [s for _, s in chunk]) for chunk in chunks],
        call={name: given[name] for name in CALL if name in given},
        out=choose_folder(given.get("out"), len(pairs)),
        model=given.get("model", DEFAULT),
        device=given.get("device", "auto"),
        precision=given.get("precision", "32"),
        sources=sources_of(given, recorded={}),
    )


def again(arguments: Arguments) -> Job:
    """The job of a recorded picture: the batch that it was in, of which only its place is kept."""
    given = arguments.given
    if clash := [name for name in ("n", "prompts_file", "batch_size") if name in given]:
        raise UsageError(f"from= draws one picture in the batch it was drawn in; leave out {clash[0]}=")
    if len(arguments.prompts) > 1:
        raise UsageError("from= draws one picture; give at most one prompt with it, which replaces the recorded one")
    source = given["from"]
    recorded = read_metadata(source)
    try:
        batch, keep = recorded["batch"], recorded["batch"]["position"]
        prompts, seeds = list(batch["prompts"]), list(batch["seeds"])
        prompts[keep] = (arguments.prompts or prompts[keep : keep + 1])[0]
        seeds[keep] = given.get("seed", seeds[keep])
        replaced: dict[str, Any] = {f"{name}_options": {} for name in ("sampler", "spacing") if name in given}
        chosen = {**UNRECORDED, **recorded, **replaced, **{name: given[name] for name in given if name != "from"}}
        return Job(
            batches=[(prompts, seeds)],
            call={name: chosen[name] for name in CALL} | {"size": tuple(chosen["size"])},
            out=choose_folder(given.get("out"), 1),
            model=chosen["model"],
            device=chosen["device"],
            precision=chosen["precision"],
            keep=keep,
            threads=recorded["threads"] if chosen["device"] == "cpu" else None,
            fingerprint=None if "model" in given else recorded["fingerprint"],
            sources=sources_of(given, recorded),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{source} does not hold all settings of a picture that sample.py drew") from error


def read_prompts(path: str) -> list[str]:
    """The lines of a .txt that are not empty. Raises ValueError or FileNotFoundError."""
    file = Path(path).expanduser()
    if file.suffix != ".txt":
        raise ValueError(f"prompts_file={path} is of a kind that cannot be read yet; give a .txt, one prompt a line")
    if not file.is_file():
        raise FileNotFoundError(f"there is no prompts_file {path}")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts_file={path} is not UTF-8 text; save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts_file={path} holds no prompt; write one a line")
    return prompts


def choose_folder(given: str | None, count: int) -> Path:
    """`given`, if no picture there would be overwritten; else a new folder named by the time."""
    if given is None:
        stamp = Path("samples") / time.strftime("%Y-%m-%d_%H-%M-%S")
        names = (stamp.with_name(f"{stamp.name}_{k}") if k else stamp for k in range(1000))
        return next(name for name in names if not name.exists())
    out = Path(given).expanduser()
    for name in (*map(file_name, range(count)), "grid.png"):
        if (out / name).exists():
            raise ValueError(f"out={given} already holds {name}; give another folder, or move that picture away")
    return out


def file_name(index: int) -> str:
    return f"{index:04d}.png"


def draw(job: Job) -> None:
    """Writes pictures as soon as they are drawn, so that Ctrl-C loses none, and at the end the grid."""
    if job.threads:
        torch.set_num_threads(job.threads)  # on the CPU, sums are split among threads and round accordingly
    shown: list[Image] = []
    captions: list[str] = []
    done = 0
    try:
        pipeline, origin = load(job)
        for image, settings in pictures(job, pipeline):
            path = job.out / file_name(done)
            save_png(image, path, settings | origin | {name: one.record for name, one in job.sources.items()})
            clear()
            print(path, flush=True)
            done += 1
            if done <= GRID_MOST:
                shown.append(image)
                captions.append(f"{settings['prompt']} ({settings['seed']})")
    except KeyboardInterrupt:
        clear()
        print(f"stopped: {done} of {job.total} pictures are in {job.out}", file=sys.stderr)
        raise
    save_png(grid(shown, captions), job.out / "grid.png", {"grid": len(shown)})
    print(job.out / "grid.png")


def pictures(job: Job, pipeline: Pipeline) -> Iterator[tuple[Image, dict[str, Any]]]:
    """The wanted pictures, batch by batch, with the settings that draw them again."""
    steps = job.call.get("steps", pipeline.settings.steps)
    if job.sources:
        steps = steps_walked(steps, job.call.get("strength") or STRENGTH)
    progress = Progress(steps * len(job.batches))
    call = job.call | {CALLED[name]: source.image for name, source in job.sources.items()}
    for prompts, seeds in job.batches:
        count = len(prompts)
        result = pipeline(prompts, seeds=seeds, batch_size=count, on_step=lambda *_: progress.step(), **call)
        batch = list(zip(to_pil(result.images), result.settings, strict=True))
        yield from batch if job.keep is None else [batch[job.keep]]


def load(job: Job) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline, and what besides the settings of a call decides a picture's every bit."""
    model = read_model(job.model)
    fingerprint = model.fingerprint
    if job.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"model={job.model} is no longer the one that drew this picture; "
            "give model= the right one, or another to draw it with that"
        )
    pipeline = Pipeline.of(model, job.device, DTYPES[job.precision])
    return pipeline, {
        "model": job.model,
        "fingerprint": fingerprint,
        "device": str(pipeline.device),
        "precision": job.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ldm": ldm_version(),
    }


def ldm_version() -> str:
    try:
        return version("ldm")
    except PackageNotFoundError:
        return "not installed"  # run from a checkout


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Each different warning of ours once, as one line on stderr."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        clear()
        print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield
