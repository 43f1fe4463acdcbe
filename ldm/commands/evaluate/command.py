"""Implements `ldm evaluate`: computes the metrics of a run for a trained model and any sampling settings."""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ldm.commands.ema.command import check_lengths
from ldm.commands.evaluate.arguments import NUMBERS, SWEPT, TOWERS
from ldm.device import allow_tf32, device_of_rank, ranks
from ldm.drawing.keys import integer, number, one_of
from ldm.ema.reconstruction import last_step, read_snapshots, reconstruct
from ldm.errors import UsageError, warnings_on_stderr
from ldm.evaluation.data import SHAPES, Data, open_data
from ldm.evaluation.result import Cell, Context, result, save_images, write
from ldm.evaluation.run import EvaluationJob, measure
from ldm.files import check_writable
from ldm.metrics.clip_score import clip_similarity
from ldm.metrics.features import Features, clip_features
from ldm.metrics.inception import inception_features
from ldm.metrics.measure import ImageMetrics
from ldm.metrics.noise_loss import encoded, noise_loss, sample_count
from ldm.metrics.provenance import text_hash
from ldm.metrics.reference import data_about, image_batches, reference
from ldm.ownership import check_outside, refuse
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.precision import choose_precision, dtype_of
from ldm.progress import Progress, clear
from ldm.report.sweep import beside
from ldm.sampling.compatibility import Setup, check
from ldm.sampling.driver import SAMPLERS
from ldm.sampling.spacing import SPACINGS
from ldm.synonyms.sampling import sampler_settings, translate
from ldm.weights.model import model_fingerprint, with_trained


def sampler(text: str) -> str:
    """Checks the name of a sampler of ldm or of another program."""
    return text if "sampler" in sampler_settings(text) else one_of(*SAMPLERS)(text)


PARSERS: dict[str, Callable[[str], Any]] = {  # of one value of each setting in SWEPT
    "steps": integer(1),
    "guidance": number,
    "sampler": sampler,
    "spacing": one_of(*SPACINGS),
    "ema-length": number,
    "seed": integer(0),
}


def run(args: argparse.Namespace) -> None:
    swept = check_arguments(args)
    rank, world, local = ranks()
    if world > 1:
        if "RANK" not in os.environ:
            raise UsageError(f"srun started {world} tasks, but ldm evaluate needs torchrun to start its ranks")
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # ranks wait for each other only at the end
        args.device = device_of_rank(args.device, local)
    with warnings_on_stderr():
        evaluate(args, swept, rank, world)
    if world > 1:
        dist.destroy_process_group()


def check_arguments(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Returns the swept settings with their values. Raises UsageError or OSError for invalid arguments."""
    for name, _, minimum, _ in NUMBERS:
        if (value := getattr(args, name.replace("-", "_"))) < minimum:
            raise UsageError(f"--{name} {value}: expected {minimum} or more")
    if args.out.is_dir():
        raise UsageError(f"--out {args.out} is a folder; give the JSON file to write")
    if args.held_out and args.data == SHAPES:
        raise UsageError(
            "--held-out is for data that a model may be trained on; shapes are always held out: leave it out"
        )
    check_writable(args.out.parent)
    check_outputs(args)
    given = {name: getattr(args, name.replace("-", "_")) for name in SWEPT}
    swept = {name: parse_values(name, text) for name, text in given.items() if text is not None}
    if "ema-length" in swept:
        check_lengths(swept["ema-length"])
        read_snapshots(Path(args.model))
    return swept


def check_outputs(args: argparse.Namespace) -> None:
    """Raises ValueError or FileExistsError if an output would be in the data or overwrite an unrelated file."""
    if args.data != SHAPES:
        check_outside(args.out, args.data, "--out", "data")
    files = [args.out, args.out.with_suffix(".png"), args.out.with_suffix(".md")]
    if args.reference and args.reference.resolve() in [file.resolve() for file in files]:
        raise UsageError(f"--reference {args.reference} is a file that --out {args.out} writes; give another")
    if not args.out.exists():  # it is written before the others
        grid = [path for path in files[1:2] if path.exists()]
        refuse(grid + beside(args.out), "ldm evaluate", "move it away, or give another --out")


def evaluate(args: argparse.Namespace, swept: dict[str, list[Any]], rank: int, world: int) -> None:
    fingerprint = model_fingerprint(args.model)
    args.precision = choose_precision(args.precision, args.device)
    allow_tf32(args.precision != "32")
    pipeline = Pipeline.load(args.model, args.device, dtype_of(args.precision))
    chosen = args.model, args.held_out, args.prompts, args.count, pipeline.device
    data = open_data(args.data, pipeline.settings.size, *chosen)
    count = min(args.count, len(data.images))  # type: ignore[arg-type]
    about = data_about(data.images, count)
    image_metrics = image_metrics_of(args)
    image_metrics.to(pipeline.device)
    cells = list(cells_of(args, swept, pipeline, data, [fingerprint, about, *image_metrics_about(args, image_metrics)]))
    if is_done(args.out, cells):
        print(f"{args.out} already holds this evaluation")
        return
    if not rank:
        own = partial_folder(args.out) / f"reference_{text_hash([str(image_metrics.features.about), str(about)])[:16]}"
        pictures = image_batches(data.images, count, args.batch)
        real = reference(args.reference or own, image_metrics.features, pictures, about)
    curves, validation = {}, 0 if rank else sample_count(args.validation, count)
    for length in dict.fromkeys(cell.length for cell in cells):
        if length is not None:
            weights = with_trained(args.model, averaged_weights(Path(args.model), length))
            pipeline.backbone.load_state_dict(pipeline.backbone.state_dict() | weights)
        run_jobs([cell.job for cell in cells if cell.length == length], pipeline, image_metrics, rank, world)
        if validation:
            samples = (data.images[i] for i in range(validation))
            curves[length] = noise_loss(pipeline.denoiser, encoded(pipeline, samples, args.batch, pipeline.device))
    if world > 1:
        dist.barrier()
    if not rank:
        context = Context(args.model, args.data, fingerprint, pipeline.device, args.precision)
        finish(args.out, cells, [result(cell, context, image_metrics, real, curves.get(cell.length)) for cell in cells])


def finish(out: Path, cells: list[Cell], reports: list[dict[str, Any]]) -> None:
    write(out, reports)
    if len(cells) == 1:
        save_images(out.with_suffix(".png"), cells[0])
    for path in partial_folder(out).iterdir():
        if re.fullmatch(r"(reference_)?[0-9a-f]{16}", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with suppress(OSError):  # if it holds other files
        partial_folder(out).rmdir()


def partial_folder(out: Path) -> Path:
    """Returns the folder of partial results."""
    return out.with_name(f".{out.name}.parts")


def parse_values(name: str, text: str) -> list[Any]:
    """Parses values separated by commas. Raises UsageError."""
    try:
        values = [PARSERS[name](part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--{name} {text}: expected {error}, or several separated by commas") from error
    meant = [str((name == "sampler" and sampler_settings(value)) or {name: value}) for value in values]
    if len(set(meant)) < len(values):
        raise UsageError(f"--{name} {text}: a value is given twice; give each once")
    return values


def image_metrics_of(args: argparse.Namespace) -> ImageMetrics:
    features: Features = (inception_features if args.features.endswith(".pth") else clip_features)(args.features)
    clip = clip_similarity(args.clip) if args.clip else clip_similarity(*TOWERS)
    return ImageMetrics(features, clip, args.data == SHAPES, args.resamples, args.infinity)


def image_metrics_about(args: argparse.Namespace, image_metrics: ImageMetrics) -> list[Any]:
    return [
        image_metrics.features.about,
        image_metrics.clip and image_metrics.clip.fingerprint,
        args.resamples,
        args.infinity,
        args.validation,
    ]


def averaged_weights(run: Path, length: float) -> dict[str, Any]:
    """Returns a run's averaged weights. Raises FileNotFoundError or ValueError if its snapshots do not allow it."""
    snapshots = read_snapshots(run)
    return reconstruct(snapshots, last_step(snapshots), length)[0]


def cells_of(
    args: argparse.Namespace, swept: dict[str, list[Any]], pipeline: Pipeline, data: Data, common: list[Any]
) -> Iterator[Cell]:
    """Yields the evaluations of a sweep. Raises ValueError for invalid settings, before sampling starts."""
    count = min(args.prompts, data.prompt_count)
    common = [*common, text_hash(data.prompts or []), count, args.batch, args.precision, pipeline.device.type]
    for values in product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        first, length = chosen.pop("seed", 0) * count, chosen.pop("ema-length", None)
        chosen, notes = translate(chosen, {})
        for note in notes:
            warnings.warn(note, stacklevel=2)
        settings = pipeline.settings.overridden(chosen)
        check(Setup(pipeline.denoiser.schedule, pipeline.denoiser.prediction, sampling=asdict(settings)))
        determining = json.dumps([*common, asdict(settings), first, length], sort_keys=True)
        identity = hashlib.sha256(determining.encode()).hexdigest()
        folder = partial_folder(args.out) / identity[:16]
        yield Cell(EvaluationJob(folder, data.captions, count, args.batch, first, settings), length, identity)


def is_done(out: Path, cells: list[Cell]) -> bool:
    """Returns whether `out` contains these evaluations. Raises ValueError if it contains anything else."""
    if not out.exists():
        return False
    try:
        held = json.loads(out.read_text())
        found = [report["provenance"]["identity"] for report in held.get("evaluations", [held])]
    except (ValueError, KeyError, TypeError, AttributeError):
        found = []
    if found != [cell.identity for cell in cells]:
        raise ValueError(f"{out} exists and holds something else; give another --out, or move it away")
    return True


def run_jobs(jobs: list[EvaluationJob], pipeline: Pipeline, image_metrics: ImageMetrics, rank: int, world: int) -> None:
    own = sum(len(ids) for job in jobs for ids in job.batches()[rank::world])
    left = sum(len(ids) for job in jobs for ids in job.todo(rank, world))
    progress = Progress(own, "images", f"rank {rank}: " if world > 1 else "", done=own - left)
    try:
        for job in jobs:
            for count in measure(job, pipeline, image_metrics, rank, world):
                progress.step(count)
    except KeyboardInterrupt:
        clear()
        print(f"stopped: {progress.done} of {own} images are measured; run the same command to resume", file=sys.stderr)
        raise
