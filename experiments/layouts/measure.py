"""Measures the loss curves of one training in several layouts of ranks, batches and accumulation.

    ldm bench layouts --json FILE

A small UNet learns 64 images of shapes in float32 on the CPU, 8 images per step, for 200 steps.
"""

import csv
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
STEPS, GLOBAL = 200, 8
TRAINING = (
    *("model.width=32", "model.groups=8", "model.blocks=1", "data.count=64", f"data.global_batch={GLOBAL}"),
    *("optimizer=adamw", "optimizer.lr=1e-3", "lr=constant", "precision=fp32", "logger=csv", "metrics=none"),
    *("callbacks.previews=null", "callbacks.progress=null", "trainer.limit_val_batches=0", "trainer.accelerator=cpu"),
    *("trainer.log_every_n_steps=1", f"trainer.max_steps={STEPS}", "seed=0"),
)


@dataclass(frozen=True)
class Layout:
    ranks: int
    batch: int
    workers: int = 0

    @property
    def name(self) -> str:
        accumulated = GLOBAL // (self.ranks * self.batch)
        name = f"{self.ranks}x{self.batch}" + (f", {accumulated} accumulated" if accumulated > 1 else "")
        return name + (f", {self.workers} workers" if self.workers else "")


LAYOUTS = (Layout(1, 8), Layout(2, 4), Layout(4, 2), Layout(1, 4), Layout(2, 2), Layout(2, 1), Layout(1, 8, workers=2))


def train(layout: Layout, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns the losses of all steps and the final weights."""
    run_dir = folder / f"{layout.ranks}x{layout.batch}w{layout.workers}"
    strategy = ("strategy=ddp", f"trainer.devices={layout.ranks}") if layout.ranks > 1 else ()
    split = f"data.batch_size={layout.batch}", f"data.workers={layout.workers}", f"run_dir={run_dir}"
    command = [sys.executable, str(ROOT / "train.py"), *TRAINING, *strategy, *split]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return losses, checkpoint["state_dict"]


def measure() -> dict[str, Any]:
    """Returns each layout's losses, and their largest distance from those of one process with the full batch."""
    curves, weights = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for layout in LAYOUTS:
            curves[layout.name], weights[layout.name] = train(layout, Path(folder))
            print(f"{layout.name}: loss {curves[layout.name][0]:.4f} to {curves[layout.name][-1]:.4f}", flush=True)
    first, *others = curves
    apart = {name: max(abs(a - b) for a, b in zip(curves[name], curves[first], strict=True)) for name in others}
    workers = LAYOUTS[-1].name
    same = all(torch.equal(weights[workers][key], weight) for key, weight in weights[first].items())
    return {
        "greatest_difference_of_a_loss": apart,
        "workers_change_no_bit": same and curves[workers] == curves[first],
        "curves": curves,
        "settings": {"training": list(TRAINING), "steps": STEPS, "global_batch": GLOBAL},
        "versions": {"torch": torch.__version__},
    }
