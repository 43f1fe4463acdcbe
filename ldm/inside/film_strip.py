"""The picture that the walk is heading for at each step: the denoiser's estimates of x0, decoded."""

import torch
from PIL import Image
from torch import Tensor

from ldm.image import grid, to_pil, to_uint8
from ldm.inside.noise_levels import sampling_grid
from ldm.pipeline.pipeline import Pipeline


@torch.no_grad()
def film_strip(pipeline: Pipeline, prompt: str, seed: int = 0, frames: int = 10) -> Image.Image:
    """The estimates side by side, at most `frames` of them at even strides, from the first step to the last.

    Captions say the step, and the share of noise sigma / (alpha + sigma) in the state that the estimate was made from.
    """
    if frames < 2:
        raise ValueError(f"frames is {frames}, but must be 2 or more, for the first step and the last")
    estimates, points = x0_by_step(pipeline, prompt, seed), sampling_grid(pipeline).points
    last = len(estimates) - 1
    shown = sorted({round(frame * last / (frames - 1)) for frame in range(frames)})
    with pipeline.offload.using(pipeline.first_stage):
        pictures = to_uint8(pipeline.first_stage.decode(estimates[shown]))
    captions = [f"step {step + 1}, noise {points[step].tau:.0%}" for step in shown]
    return grid(to_pil(pictures), captions, columns=len(shown))


def x0_by_step(pipeline: Pipeline, prompt: str, seed: int = 0) -> Tensor:
    """What each step of the walk to a picture takes x0 for, after guidance: latents (steps, z, h, w)."""
    estimates: list[Tensor] = []
    pipeline(prompt, seeds=seed, on_estimate=lambda _first, _step, x0: estimates.append(x0))
    return torch.cat(estimates)
