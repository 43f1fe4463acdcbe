"""The denoiser's error at each noise level, on the same data and the same noise for every model.

Training losses of models with different schedules, predictions or weightings are different quantities. The error of
x0 at a given log-SNR is the same quantity for all, so its curves can be compared, and even sample by sample, because
data and noise are fixed.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.image import from_uint8
from ldm.nn.backbone import Backbone
from ldm.nn.inpainting import INPAINTING, inpainting_hint
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.vae import VAE
from ldm.random import normal

LEVELS = (6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0)  # log-SNR, within every schedule's range


@dataclass(frozen=True)
class NoiseLoss:
    """Mean squared errors of x0, float64 (n, levels): one row per sample, one column per log-SNR."""

    levels: tuple[float, ...]
    errors: Tensor
    seed: int

    @property
    def about(self) -> dict[str, Any]:
        """The settings of the measurement, as plain data."""
        return {"count": len(self.errors), "levels": list(self.levels), "seed": self.seed}

    @property
    def means(self) -> list[float]:
        return list(self.errors.mean(dim=0).tolist())

    @property
    def standard_errors(self) -> list[float]:
        """Standard errors of the means over samples; paired differences between models vary less."""
        return list((self.errors.std(dim=0) / len(self.errors) ** 0.5).tolist())


class Encodes(Protocol):
    """A denoising network, and the networks that encode images as latents and captions as conditioning."""

    @property
    def backbone(self) -> Backbone: ...
    @property
    def first_stage(self) -> VAE: ...
    @property
    def text_encoder(self) -> TextEncoder: ...


def sample_count(wanted: int, available: int) -> int:
    """Returns how many samples `noise_loss` can measure; 0, with a warning, if that is a single one."""
    count = min(wanted, available)
    if count == 1:
        warnings.warn("the loss by noise level is skipped: it needs at least 2 validation samples, not 1", stacklevel=2)
    return count if count > 1 else 0


@torch.no_grad()
def encoded(
    model: Encodes, samples: Iterable[dict[str, Any]], batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Conditioning, Tensor]]:
    """Encodes samples with an "image" and a "caption" for `noise_loss`; latents are the means of their posteriors.

    The mask of an inpainting network covers the full image.
    """
    rest, start = iter(samples), 0
    while part := list(islice(rest, batch_size)):
        images = from_uint8(torch.stack([s["image"] for s in part]).to(device))
        moments = model.first_stage.moments(images)
        x0 = model.first_stage.latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))
        conditioning = model.text_encoder.encode([s["caption"] for s in part], device=device)
        if INPAINTING in model.backbone.reads:
            everything = torch.ones_like(images[:, :1])
            hint = inpainting_hint(images, everything, model.first_stage.factor, model.first_stage.encode)
            conditioning = conditioning.with_hint(INPAINTING, hint)
        yield x0, conditioning, torch.arange(start, start + len(part), device=device)
        start += len(part)


@torch.no_grad()
def noise_loss(
    denoiser: Denoiser,
    batches: Iterable[tuple[Tensor, Conditioning, Tensor]],
    levels: tuple[float, ...] = LEVELS,
    seed: int = 0,
) -> NoiseLoss:
    """Measures the error on batches (latents (b, c, h, w), conditioning, ids (b,)).

    Noise is keyed by (seed, id) and is the same at every level. Levels outside the schedule's range are left out.
    """
    schedule = denoiser.schedule
    ends = schedule.log_snr(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    low, high = ends.tolist()
    reached = tuple(level for level in levels if low <= level <= high)
    if not reached:
        raise ValueError(f"the schedule's log-SNR runs from {low:.3g} to {high:.3g} and includes none of {levels}")
    rows = []
    for x0, conditioning, ids in batches:
        eps = normal(seed, "noise loss", ids, 0, tuple(x0.shape[1:]))
        rows.append(torch.stack([_error(denoiser, x0, eps, conditioning, level) for level in reached], dim=1))
    if not rows or sum(map(len, rows)) < 2:
        raise ValueError("the loss by noise level needs at least two validation samples; give more")
    return NoiseLoss(reached, torch.cat(rows).cpu(), seed)


def _error(denoiser: Denoiser, x0: Tensor, eps: Tensor, conditioning: Conditioning, level: float) -> Tensor:
    """Returns the squared error (b,) at exactly this log-SNR, which may be between two steps of a discrete schedule."""
    schedule = denoiser.schedule
    t = schedule.time(torch.tensor(level, dtype=torch.float64, device=x0.device))
    x = (schedule.alpha(t) * x0 + schedule.sigma(t) * eps).to(x0.dtype)
    return (denoiser(x, t, conditioning) - x0).square().flatten(1).double().mean(1)
