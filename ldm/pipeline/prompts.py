"""Builds a denoiser of (x, t) that is conditioned on prompts and guided by them."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.guidance import autoguidance, classifier_free, interval_to_times
from ldm.nn.text_encoder import TextEncoder
from ldm.pipeline.emphasis import encode_emphasis
from ldm.pipeline.inputs import ImageRequest, endpoints
from ldm.pipeline.settings import Settings
from ldm.sampling.thresholding import get_thresholding

SYNTAXES = ("plain", "a1111")
Pair = tuple[Conditioning, Conditioning]  # conditioning of the prompts and of the negative prompts


def prompt_encoder(
    text_encoder: TextEncoder, settings: Settings, device: torch.device
) -> Callable[[list[str]], Conditioning]:
    """Returns the function that encodes prompts in the syntax of the settings."""
    encode = text_encoder.encode if settings.prompt_syntax == "plain" else partial(encode_emphasis, text_encoder)
    return partial(encode, chunks=settings.chunks, skip=settings.clip_skip, device=device)


def encode_prompts(requests: Sequence[ImageRequest], encode: Callable[[list[str]], Conditioning]) -> Pair:
    """Encodes each distinct negative prompt once, and interpolates linearly between two prompts."""
    prompts, others, shares = endpoints([request.prompt for request in requests])
    negatives = list(dict.fromkeys(request.negative for request in requests))
    both = encode(prompts + negatives)
    positive, negative = both[: len(requests)], both[len(requests) :]
    if any(shares):
        second = encode(others)
        positive = positive.lerp(second, torch.tensor(shares, device=second.get("text").device))
    return positive, negative[[negatives.index(request.negative) for request in requests]]


def guided(
    denoiser: Denoiser, weak: Denoiser | None, conditionings: Pair, requests: Sequence[ImageRequest], settings: Settings
) -> Denoise:
    """Guides away from the negative prompts or, with a `weak` denoiser, from its estimate for the same prompts."""
    positive, negative = conditionings
    scales = [request.guidance for request in requests]
    scale = scales[0] if len(set(scales)) == 1 else torch.tensor(scales, device=positive.get("text").device)
    interval = settings.guidance_interval and interval_to_times(denoiser.schedule, settings.guidance_interval)
    if weak is None:
        denoise = classifier_free(denoiser, positive, negative, scale, interval, rescale=settings.guidance_rescale)
    else:
        strong, worse = _conditioned(denoiser, positive), _conditioned(weak, positive)
        denoise = autoguidance(strong, worse, scale, interval, settings.guidance_rescale)
    return get_thresholding(settings.thresholding, settings.thresholding_options)(denoise)


def _conditioned(denoiser: Denoiser, conditioning: Conditioning) -> Denoise:
    return lambda x, t: denoiser(x, t, conditioning)
