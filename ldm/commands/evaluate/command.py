"""`ldm evaluate`: a model on data → the numbers that a run ends with, for any sampling settings, without training."""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ldm.commands.device_arguments import add_device_arguments
from ldm.commands.ema import check_lengths
from ldm.device import DTYPES, choose_precision
from ldm.drawing.keys import number, one_of, whole
from ldm.ema.reconstruction import last_step, read_snapshots, reconstruct
from ldm.errors import UsageError, shown_warnings
from ldm.evaluation.data import SHAPES, Data, data_of
from ldm.evaluation.result import Cell, Where, result, save_sheet, write
from ldm.evaluation.run import Job, measure
from ldm.files import check_writable
from ldm.metrics.clip_score import clip_similarity
from ldm.metrics.features import Features, clip_features
from ldm.metrics.inception import inception_features
from ldm.metrics.measure import Ruler
from ldm.metrics.noise_loss import encoded, noise_loss
from ldm.metrics.provenance import text_hash
from ldm.metrics.reference import data_about, pictures_of, reference
from ldm.ownership import check_outside, refuse
from ldm.pipeline.pipeline import Pipeline
from ldm.progress import Progress, clear
from ldm.report.sweep import beside
from ldm.sampling.compatibility import Setup, check
from ldm.sampling.driver import SAMPLERS
from ldm.sampling.spacing import SPACINGS
from ldm.weights.find import READABLE
from ldm.weights.model import model_fingerprint, with_trained

TOWERS = "assets:image_tower.safetensors", "assets:text_tower.safetensors"


SWEPT: dict[str, tuple[Callable[[str], Any], str]] = {  # several values, between commas, make a sweep
    "steps": (whole(1), "steps of sampling (the model's own)"),
    "guidance": (number, "guidance scale; 1 is none (the model's own)"),
    "sampler": (one_of(*SAMPLERS), "such as ddim or dpmpp_2m (the model's own)"),
    "spacing": (one_of(*SPACINGS), "where the steps lie, such as trailing or karras (the model's own)"),
    "ema-length": (number, "of an average of a run's weights that was trained with ema=power, see `ldm ema`"),
    "seed": (whole(0), "the i-th of n prompts is drawn from the noise of seed · n + i (0)"),
}
NUMBERS = (
    ("prompts", 512, 1, "pictures to draw, at most as many as there are captions"),
    ("count", 2048, 1, "real pictures to compare with, at most as many as there are"),
    ("batch", 64, 1, "pictures at a time"),
    ("validation", 128, 0, "real pictures for the error by noise level; 0 for none"),
    ("held-out", 0, 0, "take of the data only what training with data.held_out_every=N held out; 0 takes all"),
    ("resamples", 0, 0, "bootstrap resamples behind fid_error and kid_error; 0 for none"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw prompts with a model and measure the pictures, as at the end of a run: FID, KID, precision, recall, CLIP "
        "score, error by noise level, and for shapes whether each picture is as asked for. The same command goes on "
        "where it was stopped; `torchrun --nproc-per-node N -m ldm evaluate …` shares the prompts out, with the same "
        "numbers. Several values between commas (--steps 5,10,20 --guidance 1,2) make a sweep: a table, JSON that "
        "`ldm compare` reads, and plots of quality against seconds and network calls."
    )
    parser.add_argument("model", metavar="MODEL", help=READABLE)
    parser.add_argument("--data", required=True, metavar="D", help="shapes, a folder of pictures, shards, or a cache")
    parser.add_argument("--out", required=True, type=Path, metavar="F", help="the JSON file to write")
    for name, (_, text) in SWEPT.items():
        parser.add_argument(f"--{name}", metavar=name[0].upper(), help=text)
    for name, default, _, text in NUMBERS:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--infinity", action="store_true", help="also FID extrapolated to ever more pictures")
    parser.add_argument(
        "--features", default=TOWERS[0], metavar="W", help="a CLIP, or a .pth of Inception-v3 (the tower that ships)"
    )
    parser.add_argument("--clip", metavar="W", help="a whole CLIP for the CLIP score (the towers that ship)")
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="keeps the real pictures' features for next time"
    )
    add_device_arguments(parser, precision="32")


def run(args: argparse.Namespace) -> None:
    swept = checked(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # ranks wait for one another only at the end
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else args.device
    with shown_warnings():
        work(args, swept, rank, world)
    if world > 1:
        dist.destroy_process_group()


def checked(args: argparse.Namespace) -> dict[str, list[Any]]:
    """The settings that are swept, with their values. Raises UsageError or OSError for arguments that cannot be."""
    for name, _, least, _ in NUMBERS:
        if (value := getattr(args, name.replace("-", "_"))) < least:
            raise UsageError(f"--{name} {value}: expected {least} or more")
    if args.out.is_dir():
        raise UsageError(f"--out {args.out} is a folder; give the JSON file to write")
    if args.held_out and args.data == SHAPES:
        raise UsageError("--held-out is for data that a model may be trained on; shapes are held out as they are")
    check_writable(args.out.parent)
    check_outputs(args)
    given = {name: getattr(args, name.replace("-", "_")) for name in SWEPT}
    swept = {name: listed(name, text) for name, text in given.items() if text is not None}
    if "ema-length" in swept:
        check_lengths(swept["ema-length"])
        read_snapshots(Path(args.model))
    return swept


def check_outputs(args: argparse.Namespace) -> None:
    """Raises ValueError or FileExistsError where a file of the evaluation would be read as data or replace another."""
    if args.data != SHAPES:
        check_outside(args.out, args.data, "--out", "data")
    files = [args.out, args.out.with_suffix(".png"), args.out.with_suffix(".md")]
    if args.reference and args.reference.resolve() in [file.resolve() for file in files]:
        raise UsageError(f"--reference {args.reference} is a file that --out {args.out} writes; give another")
    if not args.out.exists():  # which comes before them
        picture = [path for path in files[1:2] if path.exists()]
        refuse(picture + beside(args.out), "ldm evaluate", "move it away, or give another --out")


def work(args: argparse.Namespace, swept: dict[str, list[Any]], rank: int, world: int) -> None:
    fingerprint = model_fingerprint(args.model)
    args.precision = choose_precision(args.precision, args.device)
    pipeline = Pipeline.load(args.model, args.device, DTYPES[args.precision])
    data = data_of(args.data, pipeline.settings.size, args.model, args.held_out, args.prompts, args.count)
    count = min(args.count, len(data.pictures))  # type: ignore[arg-type]
    about = data_about(data.pictures, count)
    ruler = ruler_of(args)
    ruler.to(pipeline.device)
    cells = list(cells_of(args, swept, pipeline, data, [fingerprint, about, *ruler_about(args, ruler)]))
    if is_done(args.out, cells):
        print(f"{args.out} holds this evaluation already")
        return
    if not rank:
        own = parts(args.out) / f"reference_{text_hash([str(ruler.features.about), str(about)])[:16]}"
        pictures = pictures_of(data.pictures, count, args.batch)
        real = reference(args.reference or own, ruler.features, pictures, about)
    curves = {}
    for length in dict.fromkeys(cell.length for cell in cells):
        if length is not None:
            weights = with_trained(args.model, averaged(Path(args.model), length))
            pipeline.backbone.load_state_dict(pipeline.backbone.state_dict() | weights)
        draw([cell.job for cell in cells if cell.length == length], pipeline, ruler, rank, world)
        if args.validation and not rank:
            samples = (data.pictures[i] for i in range(min(args.validation, count)))
            curves[length] = noise_loss(pipeline.denoiser, encoded(pipeline, samples, args.batch, pipeline.device))
    if world > 1:
        dist.barrier()
    if not rank:
        where = Where(args.model, args.data, fingerprint, pipeline.device, args.precision)
        finish(args.out, cells, [result(cell, where, ruler, real, curves.get(cell.length)) for cell in cells])


def finish(out: Path, cells: list[Cell], reports: list[dict[str, Any]]) -> None:
    write(out, reports)
    if len(cells) == 1:
        save_sheet(out.with_suffix(".png"), cells[0])
    for path in parts(out).iterdir():
        if re.fullmatch(r"(reference_)?[0-9a-f]{16}", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with suppress(OSError):  # where there is anything else
        parts(out).rmdir()


def parts(out: Path) -> Path:
    """The folder of what is measured so far."""
    return out.with_name(f".{out.name}.parts")


def listed(name: str, text: str) -> list[Any]:
    """The values between commas. Raises UsageError."""
    try:
        values = [SWEPT[name][0](one.strip()) for one in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--{name} {text}: expected {error}, several of them between commas") from error
    if len(set(values)) < len(values):
        raise UsageError(f"--{name} {text}: a value is given twice; give each once")
    return values


def ruler_of(args: argparse.Namespace) -> Ruler:
    features: Features = (inception_features if args.features.endswith(".pth") else clip_features)(args.features)
    clip = clip_similarity(args.clip) if args.clip else clip_similarity(*TOWERS)
    return Ruler(features, clip, args.data == SHAPES, args.resamples, args.infinity)


def ruler_about(args: argparse.Namespace, ruler: Ruler) -> list[Any]:
    return [ruler.features.about, ruler.clip and ruler.clip.fingerprint, args.resamples, args.infinity, args.validation]


def averaged(run: Path, length: float) -> dict[str, Any]:
    """The run's weights, averaged. Raises FileNotFoundError or ValueError where it has no snapshots to make that of."""
    snapshots = read_snapshots(run)
    return reconstruct(snapshots, last_step(snapshots), length)[0]


def cells_of(
    args: argparse.Namespace, swept: dict[str, list[Any]], pipeline: Pipeline, data: Data, common: list[Any]
) -> Iterator[Cell]:
    """Raises ValueError where one of them cannot be, before anything is drawn."""
    count = min(args.prompts, data.most)
    common = [*common, text_hash(data.prompts or []), count, args.batch, args.precision, pipeline.device.type]
    for values in product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        first, length = chosen.pop("seed", 0) * count, chosen.pop("ema-length", None)
        settings = pipeline.settings.changed(chosen)
        check(Setup(pipeline.denoiser.schedule, pipeline.denoiser.prediction, sampling=asdict(settings)))
        decisive = json.dumps([*common, asdict(settings), first, length], sort_keys=True)
        identity = hashlib.sha256(decisive.encode()).hexdigest()
        folder = parts(args.out) / identity[:16]
        yield Cell(Job(folder, data.captions, count, args.batch, first, settings), length, identity)


def is_done(out: Path, cells: list[Cell]) -> bool:
    """Raises ValueError where `out` holds something else than these cells would give."""
    if not out.exists():
        return False
    try:
        held = json.loads(out.read_text())
        found = [one["provenance"]["identity"] for one in held.get("evaluations", [held])]
    except (ValueError, KeyError, TypeError, AttributeError):
        found = []
    if found != [cell.identity for cell in cells]:
        raise ValueError(f"{out} is there already and holds something else; give another --out, or move it away")
    return True


def draw(jobs: list[Job], pipeline: Pipeline, ruler: Ruler, rank: int, world: int) -> None:
    own = sum(len(ids) for job in jobs for ids in job.batches()[rank::world])
    left = sum(len(ids) for job in jobs for ids in job.todo(rank, world))
    progress = Progress(own, "pictures", f"rank {rank}: " if world > 1 else "", done=own - left)
    try:
        for job in jobs:
            for count in measure(job, pipeline, ruler, rank, world):
                progress.step(count)
    except KeyboardInterrupt:
        clear()
        print(f"stopped: {progress.done} of {own} pictures are measured; the same command goes on", file=sys.stderr)
        raise
