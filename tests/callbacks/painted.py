"""Replaces sampling by an exact renderer of shapes captions, so that every image is correct."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data.sources.phrasing import parse
from ldm.data.sources.shapes import place, render
from tests.callbacks.tiny import Tiny


class Model(Tiny):
    """A tiny module with the attributes that sampling reads; only the denoising network is real."""

    first_stage = text_encoder = schedule = prediction = None
    denoiser = SimpleNamespace(time=None)
    sampling = {"sampler": "ddim", "spacing": "trailing", "steps": 7, "guidance": 3.0}  # noqa: RUF012
    size = (64, 64)
    seed = 5


class Painter:
    """Replaces Pipeline: renders each prompt after mapping it by `understood`."""

    calls: list[tuple[list[str], list[int], Tensor]]

    def __init__(self, backbone: nn.Module, *_: Any) -> None:
        self.backbone = backbone

    @staticmethod
    def understood(prompt: str) -> str:
        return prompt

    def __call__(self, prompts: list[str], seeds: list[int], batch_size: int) -> SimpleNamespace:
        weights = torch.cat([weight.detach().flatten() for weight in self.backbone.parameters()])
        self.calls.append((prompts, seeds, weights))
        images = [self.paint(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return SimpleNamespace(images=torch.stack(images))

    def paint(self, prompt: str, seed: int) -> Tensor:
        scene = parse(self.understood(prompt))
        placed = place(scene, np.random.default_rng(seed))
        return torch.from_numpy(render(placed, scene.background)).permute(2, 0, 1)
