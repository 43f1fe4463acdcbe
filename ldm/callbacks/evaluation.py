"""The pictures and numbers that a run ends with."""

import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from ldm.callbacks.ema import EMA
from ldm.callbacks.progress import Display, clock
from ldm.callbacks.sampling import Trained, drawing, find
from ldm.callbacks.throughput import Throughput
from ldm.data.shapes import held_out_prompts, parse
from ldm.files import write_json
from ldm.image import grid, save_png, to_pil
from ldm.metrics.composition import accuracy
from ldm.metrics.features import ClipFeatures
from ldm.metrics.fid import fid

ROOT = Path(__file__).parents[2]


class Evaluation(Callback):
    """After training: draws and measures pictures, writes metrics.json and samples/final.png, prints a table.

    With `composition` the prompts are captions of shapes that training never showed, and each picture is
    checked against its own; else they are the captions of `reference`. FID is against the first `count`
    pictures of `reference`. The i-th prompt is drawn with seed + i. prompts=0: no evaluation.
    """

    def __init__(
        self,
        folder: str | Path,
        reference: Dataset[dict[str, Any]],
        features: ClipFeatures,
        prompts: int = 512,
        count: int = 2048,
        composition: bool = True,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        self.folder, self.reference, self.features = Path(folder), reference, features
        self.prompts, self.composition, self.batch_size, self.seed = prompts, composition, batch_size, seed
        self.count = min(count, len(reference))  # type: ignore[arg-type]

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._evaluate(trainer, module)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """For a run resumed after its last step, which was stopped before it had been evaluated."""
        if not (self.folder / "metrics.json").exists():
            self._evaluate(trainer, module.to(trainer.strategy.root_device))

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.prompts or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        captions = self.captions()
        began = time.monotonic()
        images = self._draw(trainer, module, captions)
        metrics: dict[str, float] = {"sampling_seconds": time.monotonic() - began}
        if self.composition:
            metrics |= composition(images, captions)
        self.features.to(module.device)
        metrics["fid"] = fid(self._real(), images.split(self.batch_size), self.features)
        if (speed := find(trainer, Throughput)) and speed.seconds:
            metrics["images_per_second"] = speed.images / speed.seconds
            metrics["training_seconds"] = speed.seconds
        self._write(images, captions, metrics, self._provenance(trainer, module, len(captions)))
        print(table(metrics, len(images), self.count, self.folder))

    def captions(self) -> list[str]:
        """What is drawn: as many prompts as asked for, or as the reference has captions."""
        if self.composition:
            return held_out_prompts(self.prompts)
        return [sample["caption"] for sample in self._samples(self.prompts)]

    def _draw(self, trainer: Trainer, module: LightningModule, captions: list[str]) -> Tensor:
        display, images = Display("sampling: picture", len(captions)), []
        with drawing(trainer, module) as draw:
            for start in range(0, len(captions), self.batch_size):
                prompts = captions[start : start + self.batch_size]
                images.append(draw(prompts, [self.seed + start + i for i in range(len(prompts))]).cpu())
                if display.due(done := start + len(prompts)):
                    display.show(done)
        display.close()
        return torch.cat(images)

    def _samples(self, count: int) -> Iterator[dict[str, Any]]:
        return (self.reference[i] for i in range(min(count, len(self.reference))))  # type: ignore[arg-type]

    def _real(self) -> Iterator[Tensor]:
        """The reference pictures in batches."""
        images: list[Tensor] = []
        for sample in self._samples(self.count):
            images.append(sample["image"])
            if len(images) == self.batch_size:
                yield torch.stack(images)
                images = []
        if images:
            yield torch.stack(images)

    def _provenance(self, trainer: Trainer, module: LightningModule, drawn: int) -> dict[str, Any]:
        model, ema = cast(Trained, module), find(trainer, EMA)
        return {
            "sampling": {**model.sampling, "size": list(model.size)},
            "prompts": {
                "count": drawn,
                "from": "ldm.data.shapes.held_out_prompts" if self.composition else "captions of the reference",
                "seeds": [self.seed, self.seed + drawn - 1],
            },
            "reference": {"data": type(self.reference).__name__, "count": self.count},
            "features": self.features.fingerprint,
            "ema": None if ema is None else {"decay": ema.decay, "warmup": ema.warmup, "updates": ema.updates},
            "steps": trainer.global_step,
            "seed": model.seed,
            "commit": commit(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else "cpu",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _write(
        self, images: Tensor, captions: list[str], metrics: dict[str, float], provenance: dict[str, Any]
    ) -> None:
        write_json(self.folder / "metrics.json", {"metrics": metrics, "provenance": provenance})
        sheet = grid(to_pil(images[:64]), captions[:64])
        save_png(sheet, self.folder / "samples" / "final.png", provenance)


def composition(images: Tensor, captions: list[str]) -> dict[str, float]:
    """Accuracy over all prompts, by attribute, and for prompts without and with an unseen pair apart."""
    scores: dict[str, float] = {}
    unseen = [parse(caption).split == "unseen" for caption in captions]
    for split, wanted in (("seen", False), ("unseen", True)):
        if chosen := [i for i, has_pair in enumerate(unseen) if has_pair == wanted]:
            shares = accuracy(images[chosen], [captions[i] for i in chosen])
            for part, share in shares.items():
                name = part if part == "accuracy" else f"accuracy_{part}"
                scores[name] = scores.get(name, 0.0) + share * len(chosen) / len(captions)
            scores[f"accuracy_{split}"] = shares["accuracy"]
    return scores


def table(metrics: dict[str, float], drawn: int, real: int, folder: Path) -> str:
    """What a run prints last: one measurement a line, in aligned columns."""
    rows = [
        (name.replace("accuracy_", "  "), f"{value:.1%}") for name, value in metrics.items() if name.startswith("acc")
    ]
    rows.append(("FID", f"{metrics['fid']:.4g} ({drawn} drawn, {real} real pictures)"))
    if "training_seconds" in metrics:
        speed = f"{metrics['images_per_second']:.4g} images/s"
        rows.append(("training", f"{clock(metrics['training_seconds'])} at {speed}"))
    rows.append(("sampling", f"{clock(metrics['sampling_seconds'])} for {drawn} pictures"))
    rows.append(("files", f"{folder / 'metrics.json'}, {folder / 'samples' / 'final.png'}"))
    return "\n".join(f"{name:<14}{value}" for name, value in rows)


def commit() -> str | None:
    """The commit that this code runs from, with "-dirty" where files differ; None outside a git checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
