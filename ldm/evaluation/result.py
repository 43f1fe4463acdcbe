"""Writes the results of `ldm evaluate`: JSON in the format of a run's metrics.json, a table, and a grid of images."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch

from ldm.ema.reconstruction import last_step, read_snapshots
from ldm.evaluation.run import EvaluationJob, collect
from ldm.files import write_json
from ldm.image import grid, save_png, to_pil
from ldm.metrics.measure import ImageMetrics, report
from ldm.metrics.noise_loss import NoiseLoss
from ldm.metrics.provenance import Provenance, text_hash
from ldm.metrics.reference import Reference
from ldm.metrics.summary import table
from ldm.report.groups import settings_of_training
from ldm.report.runs import Run, read_run
from ldm.report.sweep import write_sweep
from ldm.weights.model import open_model
from ldm.weights.storage.opening import open_tensors


@dataclass(frozen=True)
class Cell:
    """One evaluation: a job, the EMA length of its weights, and the SHA-256 of all that determines its numbers."""

    job: EvaluationJob
    length: float | None
    identity: str


@dataclass(frozen=True)
class Context:
    """The model, the data it is compared with, and the device."""

    model: str
    data: str
    fingerprint: str
    device: torch.device
    precision: str


def result(
    cell: Cell, context: Context, image_metrics: ImageMetrics, real: Reference, curve: NoiseLoss | None
) -> dict[str, Any]:
    """Returns the report of an evaluation, in the format of a run's metrics.json."""
    job, measured, size = cell.job, collect(cell.job), list(cell.job.settings.size)
    metrics = {"sampling_seconds": measured.seconds, "nfe": measured.calls / job.count}
    metrics |= image_metrics.compute(measured.rows, measured.captions, size, real)
    source = {**real.about["data"], "data": context.data, "sha256": real.about["sha256"], "size": real.about["size"]}
    trained = training_of(Path(context.model))
    provenance = Provenance(
        feature_network=image_metrics.features.about,
        feature_width=image_metrics.features.num_features,
        reference=source,
        prompts={
            "count": job.count,
            "from": "ldm.data.shapes.held_out_prompts" if image_metrics.composition else "captions of the reference",
            "sha256": text_hash(measured.captions),
            "seeds": [job.seed, job.seed + job.count - 1],
        },
        sampling={**asdict(job.settings), "size": size},
        size=size,
        ema=trained["ema"] if cell.length is None else {"length": cell.length},
        steps=trained["steps"] if cell.length is None else last_step(read_snapshots(Path(context.model))),
        seed=trained["seed"],
        ranks=None,
        dtype=f"{context.precision}-true",
        device=torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "cpu",
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        clip=None if image_metrics.clip is None else image_metrics.clip.fingerprint,
        validation=None if curve is None else curve.about | {"data": source["sha256"]},
        model={
            "weights": context.model,
            "fingerprint": context.fingerprint,
            "notes": list(open_model(context.model).notes),
            "settings": trained["settings"],
        },
        identity=cell.identity,
    ).plain()
    return report(metrics, provenance, curve)


def training_of(path: Path) -> dict[str, Any]:
    """Reads EMA, steps, seed and the settings of training from a run folder; they are None for other models."""
    run = read_run(path) if path.is_dir() else None
    if run is None or not run.config:
        return {"ema": None, "steps": None, "seed": None, "settings": None}
    settings = {key.removeprefix("ema."): value for key, value in run.config.items() if key.startswith("ema.")}
    settings.pop("_target_", None)
    return {
        "ema": settings or None,
        "steps": steps_of(run),
        "seed": run.config.get("seed"),
        "settings": settings_of_training(run),
    }


def steps_of(run: Run) -> int | None:
    """Returns the training steps of the weights in a run folder, whose training may be unfinished or resumed."""
    checkpoint = run.path / "checkpoints" / "last.ckpt"
    if checkpoint.is_file():
        return cast(int | None, open_tensors(checkpoint).metadata.get("global_step"))
    return run.provenance.get("steps")


def write(out: Path, reports: list[dict[str, Any]]) -> None:
    """Writes the JSON file and prints a human-readable table."""
    if len(reports) > 1:
        write_json(out, {"evaluations": reports})
        print(write_sweep(out))
        return
    write_json(out, reports[0])
    counts = [reports[0]["provenance"][side]["count"] for side in ("prompts", "reference")]
    files = f"{out}, {out.with_suffix('.png')}"
    print(table(reports[0]["metrics"], counts[0], counts[1], files, reports[0].get("warnings", {})))


def save_images(path: Path, cell: Cell) -> None:
    measured = collect(cell.job)
    save_png(
        grid(to_pil(measured.images), measured.captions[: len(measured.images)]), path, {"identity": cell.identity}
    )
