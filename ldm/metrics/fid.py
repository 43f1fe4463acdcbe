"""Fréchet distance between real and generated pictures (Heusel et al. 2017)."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


def fid(real: Iterable[Tensor], fake: Iterable[Tensor], features: nn.Module) -> float:
    """Distance between Gaussians fitted to the features of batches uint8 (b, 3, h, w), statistics in float64.

    `features` says its `num_features`. Warns where there are fewer pictures than that, because then the
    value says more about their number than about their quality.
    """
    device = next((p.device for p in features.parameters()), torch.device("cpu"))
    metric = FrechetInceptionDistance(feature=features).to(device)
    for batches, is_real in ((real, True), (fake, False)):
        for batch in batches:
            metric.update(batch.to(device), real=is_real)
    counts = int(metric.real_features_num_samples), int(metric.fake_features_num_samples)
    if min(counts) < 2:
        raise ValueError(f"FID needs two pictures or more on each side, not {counts[0]} real and {counts[1]} generated")
    if min(counts) <= (width := int(features.num_features)):  # type: ignore[arg-type]
        warnings.warn(
            f"FID from {counts[0]} real and {counts[1]} generated pictures, fewer than the "
            f"{width} features: compare it only with values from the same counts",
            stacklevel=2,
        )
    return float(metric.compute())
