"""The training loss, and the random times and noise at which it is evaluated."""

from dataclasses import dataclass
from math import inf
from typing import Any

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, huber_loss

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import per_sample
from ldm.diffusion.time_sampling import TimeSampler, stratified
from ldm.diffusion.weighting import Weighting
from ldm.random import normal, uniform


def diffusion_loss(
    denoiser: Denoiser,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    weighting: Weighting,
    huber: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns the weighted mean squared error of the network's output for each sample, (b,).

    x0 and eps are (b, c, h, w), t is (b,). With a `mask` (b, 1, h, w) in [0, 1], the mean over latent pixels is
    weighted by it. With `huber`, an error d larger than it costs 2·huber·d - huber² instead of
    d² (Huber 1964), which bounds the gradient of outliers.
    """
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    x = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps
    target = denoiser.prediction.target(x0, eps, alpha, sigma)
    out = denoiser.output(x, t, conditioning).to(target.dtype)
    square = (out - target).square() if huber is None else 2 * huber_loss(out, target, reduction="none", delta=huber)
    if mask is None:
        error = square.flatten(1).mean(1)
    else:
        error = (square.mean(1, keepdim=True) * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)
    return weighting(alpha, sigma, denoiser.prediction).to(error.dtype) * error


@dataclass(frozen=True)
class Objective:
    """`diffusion_loss` at random times, with random noise, keyed by (`seed`, stream, id, draw) of each sample.

    `stratified` spreads the times evenly over the global batch, by the batch's "stratum" (b, 2). `offset_noise` is the
    standard deviation of an offset per sample and channel that is added to the noise (Guttenberg 2023).
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
                f"training.offset_noise is {self.offset_noise}, but must be 0 or more, and training.huber is "
                f"{self.huber}, but must be positive or null"
            )

    @property
    def about(self) -> dict[str, Any]:
        """The settings that define the loss, besides schedule and prediction, as plain data."""
        settings = {name: value for name, value in vars(self.times).items() if isinstance(value, int | float | str)}
        return {
            "times": {"name": type(self.times).__name__, **settings},
            "weighting": {"name": self.weighting.name, **self.weighting.settings},
            "offset_noise": self.offset_noise,
            "huber": self.huber,
        }

    def __call__(
        self, denoiser: Denoiser, x0: Tensor, conditioning: Conditioning, batch: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Returns times and losses, each (b,), of latents x0 (b, z, h, w).

        The batch holds their "id" and "draw", and optionally a "mask" uint8 (b, 1, H, W): the weights of the image's
        pixels in the loss, 255 for 1, which are averaged over the area of each latent pixel.
        """
        ids, draw = batch["id"], batch["draw"]
        u = uniform(self.seed, "time", ids, draw)
        if self.stratified and "stratum" in batch:  # absent in validation, where the times of samples are fixed
            u = stratified(u, batch["stratum"])
        t = self.times.times(u)
        eps = normal(self.seed, "noise", ids, draw, tuple(x0.shape[1:]))
        if self.offset_noise:
            eps += self.offset_noise * normal(self.seed, "offset noise", ids, draw, (len(x0[0]), 1, 1))
        height, width = x0.shape[2:]
        mask = adaptive_avg_pool2d(batch["mask"].float() / 255, (height, width)) if "mask" in batch else None
        return t, diffusion_loss(denoiser, x0, eps, t, conditioning, self.weighting, self.huber, mask)
