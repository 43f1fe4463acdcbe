"""Guidance: a function from denoisers to a denoiser."""

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Conditional, Denoise
from ldm.diffusion.prediction import per_sample


def classifier_free(
    denoiser: Conditional,
    context: Tensor,
    negative: Tensor,
    scale: float | Tensor,
    interval: tuple[float, float] | None = None,
    batched: bool = True,
) -> Denoise:
    """negative + scale·(positive - negative), on x0 (Ho & Salimans 2022; a scale of 1 is no guidance).

    context and negative are (b, n, d); scale is one number or (b,). Outside the interval of times
    (Kynkäänniemi et al. 2024) the positive stands alone. `batched` makes one call of 2b samples for two of b.
    """
    if batched and context.shape != negative.shape:
        raise ValueError(
            f"the context is {tuple(context.shape)} and the negative one {tuple(negative.shape)}: "
            "pad them to one shape, or set batched=False"
        )
    pair = torch.cat((context, negative)) if batched else context  # (2b, n, d)

    def denoise(x: Tensor, t: float) -> Tensor:
        outside = interval is not None and not interval[0] <= t <= interval[1]
        if outside or (not isinstance(scale, Tensor) and scale == 1):
            return denoiser(x, t, context)
        if batched:
            positive, other = denoiser(torch.cat((x, x)), t, pair).chunk(2)
        else:
            positive, other = denoiser(x, t, context), denoiser(x, t, negative)
        return other + (per_sample(scale, x) if isinstance(scale, Tensor) else scale) * (positive - other)

    return denoise
