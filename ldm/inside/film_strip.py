"""Film strips: the decoded estimates of x0 at the steps of sampling."""

import torch
from PIL import Image
from torch import Tensor

from ldm.image import grid, to_pil, to_uint8
from ldm.inside.noise_levels import sampling_grid
from ldm.pipeline.pipeline import Pipeline


@torch.no_grad()
def film_strip(pipeline: Pipeline, prompt: str, seed: int = 0, frames: int = 10) -> Image.Image:
    """Shows up to `frames` estimates side by side, evenly spaced from the first step to the last.

    Captions give the step, and the fraction of noise sigma / (alpha + sigma) in its state.
    """
    if frames < 2:
        raise ValueError(f"frames is {frames}, but must be 2 or more, to show the first step and the last")
    estimates, points = x0_by_step(pipeline, prompt, seed), sampling_grid(pipeline).points
    last = len(estimates) - 1
    shown = sorted({round(frame * last / (frames - 1)) for frame in range(frames)})
    with pipeline.offload.using(pipeline.first_stage):
        images = to_uint8(pipeline.first_stage.decode(estimates[shown]))
    captions = [f"step {step + 1}, noise {points[step].tau:.0%}" for step in shown]
    return grid(to_pil(images), captions, columns=len(shown))


def x0_by_step(pipeline: Pipeline, prompt: str, seed: int = 0) -> Tensor:
    """Returns the estimate of x0 at each step, after guidance: latents (steps, z, h, w)."""
    estimates: list[Tensor] = []
    pipeline(prompt, seeds=seed, on_estimate=lambda _first, _step, x0: estimates.append(x0))
    return torch.cat(estimates)
