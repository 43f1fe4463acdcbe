"""Writes the final metrics of a run and their provenance to metrics.json."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO
from ldm.callbacks.find import find
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.files import write_json
from ldm.metrics.provenance import Provenance, add_hashes, image_hash

FILE = "metrics.json"


class Metrics(Callback):
    """Writes `folder`/metrics.json with the last validation metrics and the speed at the end, and prints them.

    If Evaluation measures generated images, it writes these values together with its own. For each validation set the
    provenance records the number of samples, their hash, and the module's `validation_meaning`: plain data that
    determines what its validation metrics mean.
    """

    def __init__(self, folder: str | Path, seed: int | None = None) -> None:
        self.folder, self.seed = Path(folder), seed
        self.validation: dict[str, float] = {}  # metrics of the last validation by logged name
        self.validated: int | None = None  # the step of the last validation
        self.sets: dict[str, dict[str, Any]] = {}  # provenance of the last validation by set
        self._counts: dict[str, int] = {}  # number of samples by set in this validation
        self._hashes: dict[str, int] = {}  # by set, computed in this process's first validation
        self._hashed = False

    def state_dict(self) -> dict[str, Any]:
        return {"validation": self.validation, "validated": self.validated, "sets": self.sets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.validation, self.validated, self.sets = state["validation"], state["validated"], state["sets"]

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._counts = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:  # every rank validates on all samples
            return
        name = list(trainer.datamodule.val)[dataloader_idx]  # type: ignore[attr-defined]
        self._counts[name] = self._counts.get(name, 0) + len(batch["id"])
        if not self._hashed:
            content = batch["image"] if "image" in batch else batch["moments"]
            self._hashes[name] = add_hashes(self._hashes.get(name, 0), image_hash(content, batch.get("caption", ())))

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        logged = trainer.callback_metrics.items()  # on every rank, because this may reduce them
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._hashed, self.validated = True, trainer.global_step
        self.validation = {name: float(value) for name, value in logged if name.startswith("val/")}
        meaning: dict[str, Any] = module.validation_meaning  # type: ignore[assignment]
        self.sets = {
            name: {"count": count, "sha256": f"{self._hashes[name]:064x}", **meaning}
            for name, count in self._counts.items()
        }
        io = trainer.strategy.checkpoint_io
        if isinstance(io, AtomicCheckpointIO) and io.held:  # the last checkpoint was copied before this validation
            io.held[1]["callbacks"][self.state_key] = self.state_dict()

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero or recorded_provenance(self.folder).get("steps") == trainer.global_step:
            return
        metrics, provenance = final_metrics(trainer), Provenance(seed=self.seed, **training_provenance(trainer)).plain()
        write_json(self.folder / FILE, {"metrics": metrics, "provenance": provenance})
        for name, value in metrics.items():
            print(f"{name:32} {value:.4g}")
        print(f"{'files':32} {self.folder}")


def recorded_provenance(folder: Path) -> dict[str, Any]:
    """Returns the provenance in a run folder's metrics.json, or {} if there is none."""
    file = folder / FILE
    return dict(json.loads(file.read_text())["provenance"]) if file.is_file() else {}


def final_metrics(trainer: Trainer) -> dict[str, float]:
    """Returns the last validation metrics, images per second and training seconds, if the run's callbacks have them."""
    metrics, speed = find(trainer, Metrics), find(trainer, Throughput)
    values = {} if metrics is None else dict(metrics.validation)
    if speed is not None and speed.seconds:
        values |= {"images_per_second": speed.images / speed.seconds, "training_seconds": speed.seconds}
    return values


def training_provenance(trainer: Trainer) -> dict[str, Any]:
    """Returns the fields of Provenance that describe the training and the machine."""
    metrics, ema, device = find(trainer, Metrics), find(trainer, EMA), trainer.strategy.root_device
    return {
        "ema": None if ema is None else ema.about,
        "steps": trainer.global_step,
        "ranks": trainer.world_size,
        "dtype": str(trainer.precision),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "validated": None if metrics is None else metrics.validated,
        "sets": (metrics and metrics.sets) or None,
    }
