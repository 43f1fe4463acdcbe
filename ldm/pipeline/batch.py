"""Samples one batch of images: latents from noise or from a noised source image, denoised and then decoded."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule
from ldm.image import from_uint8
from ldm.nn.inpainting import INPAINTING, inpainting_hint
from ldm.pipeline.inputs import ImageRequest
from ldm.pipeline.networks import Networks
from ldm.pipeline.prompts import encode_prompts, guided, prompt_encoder
from ldm.pipeline.seed_noise import INITIAL, seed_noise
from ldm.pipeline.settings import Settings
from ldm.pipeline.source_images import keep_unmasked, latent_mask, paste, source_tensors, step_counts
from ldm.sampling.driver import get_solver
from ldm.sampling.grid import Grid
from ldm.sampling.spacing import get_spacing


def sample_batch(
    networks: Networks,
    requests: Sequence[ImageRequest],
    settings: Settings,
    strength: float | None,
    run_solver: Callable[..., Tensor],
) -> Tensor:
    """Returns images, uint8 (b, 3, h, w) on the CPU. `run_solver` is `ldm.sampling.driver.sample` with its hooks."""
    factor, device = networks.first_stage.factor, networks.device
    shape = (networks.first_stage.latent_channels, *(length // factor for length in settings.size))
    noise = seed_noise(settings.noise, [request.seed for request in requests], shape, device)
    originals, masks = source_tensors(requests, settings.size, device)
    denoise, x0 = guided_denoiser(networks, requests, settings, originals, masks), None
    if originals is not None and not (networks.inpaints and strength == 1):
        x0 = networks.encode(from_uint8(originals), settings.tile)
        if masks is not None and not networks.inpaints:
            denoise = keep_unmasked(denoise, x0, latent_mask(masks, factor))
    grid = sampling_grid(networks.denoiser.schedule, settings, strength)
    x = grid.start(noise(INITIAL), x0)
    with networks.denoising():
        x = run_solver(get_solver(settings.sampler, settings.sampler_options), denoise, x, grid, noise)
    images = networks.decode(x, settings.tile)
    return (images if originals is None or masks is None else paste(images, originals, masks)).cpu()


def guided_denoiser(
    networks: Networks,
    requests: Sequence[ImageRequest],
    settings: Settings,
    originals: Tensor | None,
    masks: Tensor | None,
) -> Denoise:
    """Returns the guided denoiser; inpainting weights also see the mask, or one that repaints everything."""
    encode = prompt_encoder(networks.text_encoder, settings, networks.device)
    with networks.offload.using(networks.text_encoder):
        conditionings = encode_prompts(requests, encode)
    if networks.inpaints:
        if originals is None:
            originals = torch.zeros(len(requests), 3, *settings.size, dtype=torch.uint8, device=networks.device)
        if masks is None:
            masks = torch.ones(len(requests), 1, *settings.size, device=networks.device)
        encode_image = partial(networks.encode, tile=settings.tile)
        hint = inpainting_hint(from_uint8(originals), masks, networks.first_stage.factor, encode_image)
        positive, negative = conditionings
        conditionings = positive.with_hint(INPAINTING, hint), negative.with_hint(INPAINTING, hint)
    weak = None if networks.weak is None else networks.weak.denoiser
    return guided(networks.denoiser, weak, conditionings, requests, settings)


def sampling_grid(schedule: Schedule, settings: Settings, strength: float | None) -> Grid:
    """Returns the grid from pure noise or, given the strength of image-to-image, its last steps."""
    spacing = get_spacing(settings.spacing, settings.spacing_options)
    total, run = step_counts(settings.steps, strength, settings.fixed_steps)
    return Grid.to_final(schedule, spacing(schedule, total)[-run:], settings.final_sigma)
