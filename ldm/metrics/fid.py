"""Fréchet distance between real and generated images, in the features of any network (Heusel et al. 2017)."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric

from ldm.metrics.few_samples import biased
from ldm.metrics.frechet import frechet_distance, gram, moments, moments_of
from ldm.metrics.pair import Network, check_features


class FID(Metric):
    """FID from batches of features (b, d), in constant memory: a float64 sum (d + 1, d + 1) per side.

    Ranks must not share images: a distributed sampler that pads would count some of them twice.
    """

    full_state_update = False
    higher_is_better = False
    real: Tensor
    fake: Tensor

    def __init__(self, num_features: int, sync: bool = True) -> None:
        super().__init__(sync_on_compute=sync)
        self.num_features = num_features
        for side in ("real", "fake"):
            zeros = torch.zeros(num_features + 1, num_features + 1, dtype=torch.float64)
            self.add_state(side, zeros, dist_reduce_fx="sum")

    def update(self, features: Tensor, real: bool, ids: Tensor | None = None) -> None:
        """Adds features (b, d). Raises ValueError if any is not finite. `ids` are ignored: other metrics use them."""
        check_features(features, real)
        state = self.real if real else self.fake
        state += gram(features)

    def compute(self) -> Tensor:
        counts = [round(side[0, 0].item()) for side in (self.real, self.fake)]
        check_counts(counts[0], counts[1], self.num_features)
        return torch.tensor(frechet_distance(moments(self.real), moments(self.fake)), dtype=torch.float64)


def check_counts(real: int, fake: int, width: int) -> None:
    """Raises ValueError if there are too few images for a covariance, warns if the covariance is singular."""
    if min(real, fake) < 2:
        raise ValueError(f"FID needs at least two images on each side, not {real} real and {fake} generated")
    if min(real, fake) <= width:
        warnings.warn(biased(real, fake, width), stacklevel=3)


@torch.no_grad()
def fid(real: Iterable[Tensor], fake: Iterable[Tensor], features: Network) -> float:
    """Computes FID from batches of images uint8 (b, 3, h, w), in this process only.

    Warns if there are no more images than features, because the value then depends more on their number than on
    their quality.
    """
    device = next((p.device for p in features.parameters()), torch.device("cpu"))
    metric = FID(features.num_features, sync=False).to(device)
    for batches, is_real in ((real, True), (fake, False)):
        for batch in batches:
            metric.update(features(batch.to(device)), is_real)
    return float(metric.compute())


def feature_fid(real: Tensor, fake: Tensor) -> float:
    """Computes FID from features (n, d) and (m, d)."""
    return frechet_distance(moments_of(real), moments_of(fake))


def fid_infinity(real: Tensor, fake: Tensor, points: int = 15, seed: int = 0) -> float:
    """Extrapolates FID to infinitely many generated images (Chong & Forsyth 2020).

    FID's bias is linear in 1/m, so a line is fitted through the FID of `points` random subsets, whose sizes run from a
    tenth to all of fake (m, d).
    """
    if points < 2 or len(fake) < 2 * points:
        raise ValueError(
            f"FID∞ fits a line through {points} subsets: it needs at least two subsets and {2 * points} generated "
            f"images, not {len(fake)}"
        )
    generator, reference = torch.Generator().manual_seed(seed), moments_of(real)
    sizes = torch.linspace(len(fake) / 10, len(fake), points).round().long().clamp(min=2)
    values = []
    for size in sizes.tolist():
        chosen = torch.randperm(len(fake), generator=generator)[:size]
        values.append(frechet_distance(reference, moments_of(fake[chosen.to(fake.device)])))
    line = torch.stack([torch.ones(points, dtype=torch.float64), 1 / sizes.double()], dim=1)
    fit = torch.linalg.lstsq(line, torch.tensor(values, dtype=torch.float64)[:, None]).solution
    return fit[0, 0].item()
