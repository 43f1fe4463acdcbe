"""Helpers of the pipeline tests."""

from typing import Any

import torch

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Flow
from ldm.pipeline.pipeline import Pipeline

IMAGE = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PROMPTS = ["a red circle", "a blue square", "a square on a red background", "white circle", "red"]


def assembled(pipeline: Pipeline, **changes: Any) -> Pipeline:
    """Returns `pipeline` on the flow schedule, with other components where given."""
    components = {
        "backbone": pipeline.backbone,
        "first_stage": pipeline.first_stage,
        "text_encoder": pipeline.text_encoder,
        "schedule": Flow(),
        "prediction": Prediction("flow"),
        "settings": pipeline.settings,
    }
    return Pipeline(**(components | changes))


def distance(a: torch.Tensor, b: torch.Tensor) -> int:
    """Returns the largest difference between two uint8 images."""
    return int((a.int() - b.int()).abs().max())
