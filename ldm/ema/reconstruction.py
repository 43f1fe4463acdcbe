"""Averages of any length, reconstructed from the snapshots that ema=power wrote (Karras et al. 2024, EDM2)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.ema.profiles import coefficients, exponent
from ldm.progress import Progress
from ldm.weights.native import read_about
from ldm.weights.storage.opening import open_tensors


def read_snapshots(run: Path) -> dict[Path, dict[str, Any]]:
    """What the snapshots of a run say of themselves. Raises FileNotFoundError where there are none."""
    if not run.is_dir():
        raise FileNotFoundError(
            f"there are no snapshots in {run}, which is no folder; give a run's, as train.py printed it"
        )
    files = sorted((run / "ema").glob("step_*_length_*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there are no snapshots in {run / 'ema'}; train with ema=power to have them written")
    return {file: read_about(file) for file in files}


def last_step(snapshots: dict[Path, dict[str, Any]]) -> int:
    """The optimizer step of the last snapshot."""
    return max(about["ema"]["step"] for about in snapshots.values())


def reconstruct(snapshots: dict[Path, dict[str, Any]], step: int, length: float) -> tuple[dict[str, Tensor], float]:
    """The averaged weights in float32, and how far their profile is off."""
    told = [about["ema"] for about in snapshots.values()]
    steps, gammas = [one["step"] for one in told], [exponent(one["length"]) for one in told]
    factors, off = coefficients(steps, gammas, step, exponent(length))
    progress = Progress(len(snapshots), "snapshots", f"length {length:g}: ")
    total: dict[str, Tensor] = {}
    for file, factor in zip(snapshots, factors.tolist(), strict=True):
        tensors = open_tensors(file)
        for name, tensor in tensors.read(tensors).items():
            total.setdefault(name, torch.zeros(tensor.shape)).add_(tensor.float(), alpha=factor)
        progress.step()
    return total, off
