"""DDIM inversion: finds the noise from which DDIM generates a given image (Song et al. 2021, section 4.3)."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.image import from_uint8, psnr, to_uint8
from ldm.inside.noise_levels import sampling_grid
from ldm.pipeline.inputs import ImageInput, image_requests
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.source_images import source_tensors
from ldm.sampling.driver import sample
from ldm.sampling.grid import Grid
from ldm.sampling.one_step import ddim


@dataclass(frozen=True)
class Inversion:
    """The noise (1, z, h, w) of an image, and DDIM's reconstruction from it; images are uint8 (3, H, W).

    `psnr` (dB) compares the reconstruction with the original. `first_stage_psnr` is that of encoding and decoding
    alone, which an exact inversion would reach.
    """

    noise: Tensor
    original: Tensor
    reconstruction: Tensor
    psnr: float
    first_stage_psnr: float


@torch.no_grad()
def ddim_inversion(
    pipeline: Pipeline, image: ImageInput, prompt: str = "", steps: int = 50, refinements: int = 0
) -> Inversion:
    """Inverts an image, scaled and cropped to the pipeline's size, and reconstructs it, both without guidance.

    A prompt that describes the image improves the result. See `invert` for `refinements`.
    """
    items = image_requests(prompt, "", None, 1.0, image)
    originals, _ = source_tensors(items, pipeline.settings.size, pipeline.device)
    if originals is None:
        raise ValueError("there is no image to invert: give a PIL image or a uint8 tensor (3, h, w)")
    with _on_device(pipeline):
        x0 = pipeline.first_stage.encode(from_uint8(originals))
        round_trip = to_uint8(pipeline.first_stage.decode(x0))
        noise = invert(_denoise(pipeline, prompt), x0, sampling_grid(pipeline, steps), refinements)
    reconstruction = sample_from_noise(pipeline, noise, prompt, steps)
    images = from_uint8(torch.stack((reconstruction, round_trip[0].cpu())))
    return Inversion(noise, originals[0].cpu(), reconstruction, *psnr(images, from_uint8(originals.cpu())).tolist())


@torch.no_grad()
def sample_from_noise(pipeline: Pipeline, noise: Tensor, prompt: str = "", steps: int = 50) -> Tensor:
    """Generates an image, uint8 (3, H, W), from latent noise (1, z, h, w) by DDIM without guidance.

    With the noise of an inverted image and another prompt, the result is an edit of that image.
    """
    with _on_device(pipeline):
        x0 = sample(ddim, _denoise(pipeline, prompt), noise, sampling_grid(pipeline, steps))
        return to_uint8(pipeline.first_stage.decode(x0))[0].cpu()


@torch.no_grad()
def invert(denoise: Denoise, x: Tensor, grid: Grid, refinements: int = 0) -> Tensor:
    """Returns the state at the grid's first point from which DDIM reaches x, the state at its last.

    A step back from s to t needs the slope at its end, which is unknown: it is first evaluated at x, then by each
    refinement at the end of the previous attempt (Pan et al. 2023). The round-trip error is of order 1 + refinements
    in the step size, and each refinement costs one call of the denoiser per step.
    """
    if refinements < 0:
        raise ValueError(f"refinements is {refinements}, but must be 0 or more")
    for s, t in pairwise(reversed(grid.points)):
        y = ahead = x / s.scale  # DDIM is Euler on y = x / (alpha + sigma): dy/dtau = (y - x0) / tau, see `euler`
        for _ in range(1 + refinements):
            slope = (ahead - denoise(ahead * t.scale, t.time)) / t.tau
            ahead = y + (t.tau - s.tau) * slope
        x = ahead * t.scale
    return x


def _on_device(pipeline: Pipeline) -> AbstractContextManager[None]:
    return pipeline.offload.using(pipeline.text_encoder, pipeline.backbone, pipeline.first_stage)


def _denoise(pipeline: Pipeline, prompt: str) -> Denoise:
    conditioning = pipeline.text_encoder.encode([prompt], device=pipeline.device)
    return lambda x, t: pipeline.denoiser(x, t, conditioning)
