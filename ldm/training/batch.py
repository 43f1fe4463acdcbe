"""A batch of training data."""

from typing import Any

import torch
from torch import Tensor

from ldm.image import from_uint8

Batch = dict[str, Any]


def as_float(image: Tensor) -> Tensor:
    """Converts uint8 (b, 3, h, w) to float in [-1, 1], in channels-last layout."""
    return from_uint8(image).contiguous(memory_format=torch.channels_last)
