"""What the tests of the pipeline share."""

from typing import Any

import torch

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Flow
from ldm.pipeline.pipeline import Pipeline

PICTURE = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PROMPTS = ["a red circle", "a blue square", "a square on a red background", "white circle", "red"]


def assembled(pipeline: Pipeline, **changes: Any) -> Pipeline:
    parts = {
        "backbone": pipeline.backbone,
        "first_stage": pipeline.first_stage,
        "text_encoder": pipeline.text_encoder,
        "schedule": Flow(),
        "prediction": Prediction("flow"),
        "settings": pipeline.settings,
    }
    return Pipeline(**(parts | changes))


def distance(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())
