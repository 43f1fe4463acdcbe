"""Reconstructs averages of any length from the snapshots of ema=power (Karras et al. 2024, EDM2)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.ema.profiles import coefficients, exponent
from ldm.progress import Progress
from ldm.weights.native import read_about
from ldm.weights.storage.opening import open_tensors


def read_snapshots(run: Path) -> dict[Path, dict[str, Any]]:
    """Returns the metadata of a run's snapshots by file. Raises FileNotFoundError if there are none."""
    if not run.is_dir():
        raise FileNotFoundError(
            f"there are no snapshots in {run}, which is not a folder; give a run folder, as printed by train.py"
        )
    files = sorted((run / "ema").glob("step_*_length_*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there are no snapshots in {run / 'ema'}; train with ema=power to write them")
    return {file: read_about(file) for file in files}


def last_step(snapshots: dict[Path, dict[str, Any]]) -> int:
    """Returns the optimizer step of the last snapshot."""
    return max(about["ema"]["step"] for about in snapshots.values())


def reconstruct(snapshots: dict[Path, dict[str, Any]], step: int, length: float) -> tuple[dict[str, Tensor], float]:
    """Returns the averaged weights in float32, and the error of their profile (see `coefficients`)."""
    averages = [about["ema"] for about in snapshots.values()]
    steps, gammas = [ema["step"] for ema in averages], [exponent(ema["length"]) for ema in averages]
    factors, error = coefficients(steps, gammas, step, exponent(length))
    progress = Progress(len(snapshots), "snapshots", f"length {length:g}: ")
    total: dict[str, Tensor] = {}
    for file, factor in zip(snapshots, factors.tolist(), strict=True):
        tensors = open_tensors(file)
        for name, tensor in tensors.read(tensors).items():
            total.setdefault(name, torch.zeros(tensor.shape)).add_(tensor.float(), alpha=factor)
        progress.step()
    return total, error
