"""Statistics of two sets of features, real (n, d) and generated (m, d), that need all vectors at once."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

Statistic = Callable[[Tensor, Tensor], float | dict[str, float]]


class Network(Protocol):
    """A module that maps images uint8 (b, 3, h, w) to features (b, num_features)."""

    num_features: int

    def __call__(self, images: Tensor) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


class Pair(Metric):
    """Computes `statistic` on the features of all ranks, ordered by their ids, each id counted once.

    The value therefore depends neither on the number of ranks nor on a sampler that pads the last batch.
    """

    full_state_update = False
    real: list[Tensor]
    fake: list[Tensor]
    real_ids: list[Tensor]
    fake_ids: list[Tensor]

    def __init__(self, statistic: Statistic, sync: bool = True) -> None:
        super().__init__(sync_on_compute=sync)
        self.statistic = statistic
        for state in ("real", "fake", "real_ids", "fake_ids"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool, ids: Tensor) -> None:
        """Adds features (b, d) of the images with ids (b,); a rank without images must add an empty batch."""
        check_features(features, real)
        (self.real if real else self.fake).append(features)
        (self.real_ids if real else self.fake_ids).append(ids.to(features.device))

    def compute(self) -> Any:
        if not len(self.real) or not len(self.fake):
            raise ValueError("both real and generated images are needed, but one side has none; update with both")
        value = self.statistic(_ordered(self.real, self.real_ids), _ordered(self.fake, self.fake_ids))
        if isinstance(value, dict):
            return {name: torch.tensor(number, dtype=torch.float64) for name, number in value.items()}
        return torch.tensor(value, dtype=torch.float64)


def _ordered(features: list[Tensor], ids: list[Tensor]) -> Tensor:
    values, order = torch.sort(dim_zero_cat(ids), stable=True)
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    return dim_zero_cat(features)[order[first]]


def check_features(features: Tensor, real: bool) -> None:
    """Raises ValueError unless the features are a matrix (b, d) of finite numbers."""
    side = "real" if real else "generated"
    if features.ndim != 2:
        raise ValueError(f"features of {side} images must be (b, d), not {tuple(features.shape)}")
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(features)} {side} images have features that are NaN or infinite: "
            "the feature network overflowed or its weights are corrupt; run it in float32 or download them again"
        )


def bootstrap_error(statistic: Callable[[Tensor, Tensor], float], resamples: int = 100, seed: int = 0) -> Statistic:
    """Returns a function that estimates the standard error of `statistic` by the bootstrap (Efron 1979).

    It resamples the generated images only. ±1.96 standard errors is a 95 % interval.
    """
    if resamples < 2:
        raise ValueError(f"a bootstrap needs at least two resamples, not {resamples}")

    def error(real: Tensor, fake: Tensor) -> float:
        generator = torch.Generator().manual_seed(seed)
        samples = (torch.randint(len(fake), (len(fake),), generator=generator) for _ in range(resamples))
        values = [statistic(real, fake[sample.to(fake.device)]) for sample in samples]
        return torch.tensor(values, dtype=torch.float64).std().item()

    return error
