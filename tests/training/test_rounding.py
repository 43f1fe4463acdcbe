"""Verifies the rounding bound from which tolerances between training runs are derived."""

from typing import Any

import pytest
import torch

from ldm.conditioning import Conditioning
from tests.tiny import tiny_unet
from tests.training.tiny import GRADIENT


def gradient(dtype: torch.dtype, seed: int, rows: slice) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shapes: Any = ((4, 4, 4, 4), (4, 16, 16), (4, 4, 4, 4))
    x, context, target = (torch.randn(shape, generator=generator)[rows].to(dtype) for shape in shapes)
    unet = tiny_unet().to(dtype)
    time = torch.tensor([100.0, 400.0, 700.0, 900.0])[rows]
    (unet(x, time, Conditioning(text=context)) - target).square().mean().backward()
    return torch.cat([weight.grad.flatten() for weight in unet.parameters() if weight.grad is not None]).double()


@pytest.mark.parametrize("seed", range(3))
def test_a_float32_gradient_is_exact_up_to_rounding(seed: int) -> None:
    exact, full = (gradient(dtype, seed, slice(4)) for dtype in (torch.float64, torch.float32))
    halves = sum(gradient(torch.float32, seed, rows) for rows in (slice(2), slice(2, 4))) / 2
    for rounded in (full, halves):
        assert (rounded - exact).abs().max() <= GRADIENT * exact.norm()
