"""The numbers that every run ends with, and where they come from."""

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
    """At the end writes `folder`/metrics.json with the numbers of the last validation and the speed, and prints them.

    Where Evaluation measures generated images, it writes these numbers together with its own. The provenance records
    of each validation set how many samples were used, their hash, and the module's `ruler`: plain data that decides
    what its validation numbers mean.
    """

    def __init__(self, folder: str | Path, seed: int | None = None) -> None:
        self.folder, self.seed = Path(folder), seed
        self.validation: dict[str, float] = {}  # of the last one, by the name in the log
        self.validated: int | None = None  # its step
        self.sets: dict[str, dict[str, Any]] = {}  # what it was measured on
        self._counts: dict[str, int] = {}  # samples by set, in this validation
        self._hashes: dict[str, int] = {}  # by set, from this process's first validation
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
        found = trainer.callback_metrics.items()  # on every rank, since this may reduce them
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._hashed, self.validated = True, trainer.global_step
        self.validation = {name: float(value) for name, value in found if name.startswith("val/")}
        ruler: dict[str, Any] = module.ruler  # type: ignore[assignment]
        self.sets = {
            name: {"count": count, "sha256": f"{self._hashes[name]:064x}", **ruler}
            for name, count in self._counts.items()
        }
        io = trainer.strategy.checkpoint_io
        if isinstance(io, AtomicCheckpointIO) and io.held:  # the run's last checkpoint, made before this validation
            io.held[1]["callbacks"][self.state_key] = self.state_dict()

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero or recorded(self.folder).get("steps") == trainer.global_step:
            return
        metrics, provenance = numbers(trainer), Provenance(seed=self.seed, **trained(trainer)).plain()
        write_json(self.folder / FILE, {"metrics": metrics, "provenance": provenance})
        for name, value in metrics.items():
            print(f"{name:32} {value:.4g}")
        print(f"{'files':32} {self.folder}")


def recorded(folder: Path) -> dict[str, Any]:
    """The provenance of the numbers in a run's folder; {} where there are none."""
    file = folder / FILE
    return dict(json.loads(file.read_text())["provenance"]) if file.is_file() else {}


def numbers(trainer: Trainer) -> dict[str, float]:
    """The last validation, images per second and seconds of training, as far as the run's callbacks measured them."""
    metrics, speed = find(trainer, Metrics), find(trainer, Throughput)
    found = {} if metrics is None else dict(metrics.validation)
    if speed is not None and speed.seconds:
        found |= {"images_per_second": speed.images / speed.seconds, "training_seconds": speed.seconds}
    return found


def trained(trainer: Trainer) -> dict[str, Any]:
    """What the Provenance of any numbers records of the training and of the machine."""
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
