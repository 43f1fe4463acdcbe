"""Writes run folders like those of train.py, without any training."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.image import save_png, to_pil

PROVENANCE: dict[str, Any] = {
    "feature_network": {"network": "ImageTower", "fingerprint": "a" * 64, "resize": "bicubic"},
    "reference": {"data": "Shapes", "count": 2048, "sha256": "b" * 64},
    "prompts": {"count": 512, "sha256": "c" * 64, "seeds": [0, 511]},
    "sampling": {"sampler": "ddim", "steps": 20, "guidance": 2.0},
    "size": [8, 8],
    "steps": 20,
    "ranks": 1,
    "commit": "d" * 40,
}


def settings(folder: Path, seed: int, schedule: str) -> dict[str, Any]:
    """Returns a config that repeats the schedule and the seed in several places, as real configs do."""
    target = {"_target_": f"ldm.diffusion.schedule.{schedule}"}
    return {
        "seed": seed,
        "name": "shapes",
        "run_dir": str(folder),
        "schedule": target,
        "training": {"schedule": target, "seed": seed},
        "data": {"batch_size": 4, "global_batch": None, "module": {"seed": seed}},
        "evaluation": {"seed": 0, "folder": str(folder)},
        "trainer": {"max_steps": 20, "devices": "auto"},
    }


def write_run(
    folder: Path,
    seed: int = 0,
    schedule: str = "Flow",
    metrics: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    curves: bool = True,
) -> Path:
    """Writes the folder of a run; with `metrics` None it has no metrics yet."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(folder, seed, schedule)))
    if metrics is not None:
        about = copy.deepcopy(PROVENANCE) | {"seed": seed} | (provenance or {})
        noise = {"log_snr": [2.0, 0.0, -2.0], "mean": [0.1, 0.3, 0.8], "standard_error": [0.01, 0.01, 0.02]}
        report = {"metrics": metrics, "provenance": about, "curves": {"noise_loss": noise}}
        (folder / "metrics.json").write_text(json.dumps(report))
    if curves:
        (folder / "csv").mkdir()
        lines = ["step,train/images_per_second,train/loss,val/shapes/loss"]
        lines += [f"{step},120,{1 / (step + 1)},{'0.5' if step % 10 == 9 else ''}" for step in range(1, 20, 2)]
        (folder / "csv" / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def save_tiles(folder: Path, captions: list[str], seed: int = 0) -> None:
    """Saves a sheet with an 8 × 8 image for each caption; all pixels of image i have the value 10·i."""
    images = [torch.full((3, 8, 8), 10 * i, dtype=torch.uint8) for i in range(len(captions))]
    about = {"captions": captions, "seed": seed, "size": [8, 8]}
    save_png(to_pil(torch.cat(images, dim=2))[0], folder / "samples" / "tiles.png", about)
