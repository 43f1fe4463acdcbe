"""What a denoiser is trained for: the loss at times and with noise that each sample draws for itself."""

from dataclasses import dataclass
from math import inf
from typing import Any

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import diffusion_loss
from ldm.diffusion.time_sampling import TimeSampler, stratified
from ldm.diffusion.weighting import Weighting
from ldm.random import normal, uniform


@dataclass(frozen=True)
class Objective:
    """Draws are keyed by (`seed`, stream, id, draw).

    Of `stratified` times each sample has its own part, the batch's "stratum" (b, 2). `offset_noise` is the deviation
    of one number a channel that is added to the noise (Guttenberg 2023); `huber` as in `diffusion_loss`.
    """

    times: TimeSampler
    weighting: Weighting
    stratified: bool = False
    offset_noise: float = 0.0
    huber: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.offset_noise < inf and (self.huber is None or 0 < self.huber < inf)):
            raise ValueError(
                f"training.offset_noise must be 0 or more and training.huber positive or null, not "
                f"{self.offset_noise} and {self.huber}"
            )

    @property
    def about(self) -> dict[str, Any]:
        """What decides which quantity the loss is, besides schedule and prediction, as plain data."""
        settings = {name: value for name, value in vars(self.times).items() if isinstance(value, int | float | str)}
        return {
            "times": {"name": type(self.times).__name__, **settings},
            "weighting": {"name": self.weighting.name, **self.weighting.settings},
            "offset_noise": self.offset_noise,
            "huber": self.huber,
        }

    def __call__(self, denoiser: Denoiser, x0: Tensor, context: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Times and losses, each (b,), of latents x0 (b, z, h, w) whose "id" and "draw" the batch holds."""
        ids, draw = batch["id"], batch["draw"]
        u = uniform(self.seed, "time", ids, draw)
        if self.stratified and "stratum" in batch:  # not in validation, where each sample keeps its own time
            u = stratified(u, batch["stratum"])
        t = self.times.times(u)
        eps = normal(self.seed, "noise", ids, draw, tuple(x0.shape[1:]))
        if self.offset_noise:
            eps += self.offset_noise * normal(self.seed, "offset noise", ids, draw, (len(x0[0]), 1, 1))
        return t, diffusion_loss(denoiser, x0, eps, t, context, self.weighting, self.huber)
