"""Prompts, guidance and what inpainting weights see → a denoiser that needs no more than (x, t)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.guidance import autoguidance, classifier_free, times_of
from ldm.editing import small_mask, unmasked
from ldm.items import Item, ends
from ldm.nn.clip import TextTower
from ldm.nn.tokenizer import Tokenizer
from ldm.sampling.thresholding import thresholding_of
from ldm.settings import Settings

Contexts = tuple[Tensor, Tensor]  # of prompts and of negative prompts, each (b, chunks·n, d)


def encoded(
    texts: list[str], tokenizer: Tokenizer, encoder: TextTower, device: torch.device, settings: Settings
) -> Tensor:
    """The context (b, chunks·n, d) of each text, whose chunks are read one by one."""
    tokens = tokenizer(texts, settings.chunks).to(device)  # (b, chunks·n)
    states = encoder(tokens.unflatten(1, (settings.chunks, -1)).flatten(0, 1), settings.clip_skip)  # (b·chunks, n, d)
    return states.unflatten(0, (len(texts), -1)).flatten(1, 2)


def contexts_of(items: Sequence[Item], encode: Callable[[list[str]], Tensor]) -> Contexts:
    """Each different negative prompt is encoded once; what lies between two prompts lies between their contexts."""
    prompts, others, shares = ends([item.prompt for item in items])
    negatives = list(dict.fromkeys(item.negative for item in items))
    context = encode(prompts + negatives)
    positive, negative = context[: len(items)], context[len(items) :]
    if any(shares):
        share = torch.tensor(shares, device=context.device).view(-1, 1, 1)
        positive = torch.lerp(positive, encode(others), share.to(context.dtype))
    return positive, negative[[negatives.index(item.negative) for item in items]]


def guided(
    denoiser: Denoiser, weak: Denoiser | None, contexts: Contexts, items: Sequence[Item], settings: Settings
) -> Denoise:
    """Towards the prompts: away from the negative ones or, with a `weak` denoiser, from what that gives for them."""
    positive, negative = contexts
    scales = [item.guidance for item in items]
    scale = scales[0] if len(set(scales)) == 1 else torch.tensor(scales, device=positive.device)
    interval = settings.guidance_interval and times_of(denoiser.schedule, settings.guidance_interval)
    if weak is None:
        towards = classifier_free(denoiser, positive, negative, scale, interval, rescale=settings.guidance_rescale)
    else:
        strong, worse = (_told(one, positive) for one in (denoiser, weak))
        towards = autoguidance(strong, worse, scale, interval, settings.guidance_rescale)
    return thresholding_of(settings.thresholding, settings.thresholding_options)(towards)


def hint_of(originals: Tensor, masks: Tensor, factor: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """What inpainting weights see beside x: where to repaint, and latents of what is kept, (b, 1 + z, h, w)."""
    return torch.cat((small_mask(masks, factor), encode(unmasked(originals, masks))), dim=1)


def seeing(denoiser: Denoiser, hint: Tensor) -> Denoiser:
    """Of an inpainting network, with the hint (b, 1 + z, h, w) beside x (b, z, h, w)."""

    def network(x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return denoiser.network(torch.cat((x, hint), dim=1), time, context)

    return Denoiser(network, denoiser.schedule, denoiser.prediction, denoiser.time)


def _told(denoiser: Denoiser, context: Tensor) -> Denoise:
    return lambda x, t: denoiser(x, t, context)
