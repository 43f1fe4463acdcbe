"""Prompts, guidance and inpainting hints → a denoiser that needs no more than (x, t)."""

from collections.abc import Callable, Sequence

import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.guidance import autoguidance, classifier_free, times_of
from ldm.pipeline.inputs import ImageRequest, ends
from ldm.pipeline.settings import Settings
from ldm.sampling.thresholding import thresholding_of

Pair = tuple[Conditioning, Conditioning]  # of the prompts and of the negative prompts


def conditionings_of(items: Sequence[ImageRequest], encode: Callable[[list[str]], Conditioning]) -> Pair:
    """Each distinct negative prompt is encoded once; a prompt between two others is interpolated linearly."""
    prompts, others, shares = ends([item.prompt for item in items])
    negatives = list(dict.fromkeys(item.negative for item in items))
    both = encode(prompts + negatives)
    positive, negative = both[: len(items)], both[len(items) :]
    if any(shares):
        second = encode(others)
        positive = positive.lerp(second, torch.tensor(shares, device=second.get("text").device))
    return positive, negative[[negatives.index(item.negative) for item in items]]


def guided(
    denoiser: Denoiser, weak: Denoiser | None, conditionings: Pair, items: Sequence[ImageRequest], settings: Settings
) -> Denoise:
    """Towards the prompts: away from the negative ones or, with a `weak` denoiser, from its estimate for the same."""
    positive, negative = conditionings
    scales = [item.guidance for item in items]
    scale = scales[0] if len(set(scales)) == 1 else torch.tensor(scales, device=positive.get("text").device)
    interval = settings.guidance_interval and times_of(denoiser.schedule, settings.guidance_interval)
    if weak is None:
        towards = classifier_free(denoiser, positive, negative, scale, interval, rescale=settings.guidance_rescale)
    else:
        strong, worse = (_under(positive, one) for one in (denoiser, weak))
        towards = autoguidance(strong, worse, scale, interval, settings.guidance_rescale)
    return thresholding_of(settings.thresholding, settings.thresholding_options)(towards)


def _under(conditioning: Conditioning, denoiser: Denoiser) -> Denoise:
    return lambda x, t: denoiser(x, t, conditioning)
