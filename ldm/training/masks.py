"""Generates random masks for inpainting training: boxes, strokes, or the full image (Suvorov et al. 2022)."""

import torch
from torch import Tensor

from ldm.random import uniform

FULL, BOXES = 0.25, 0.375  # shares of the masks; the rest are strokes
SHAPES = 4  # maximum number of boxes or stroke segments
SIDES = 0.15, 0.6  # sides of a box, as shares of the image's sides
WIDTHS = 0.03, 0.12  # half width of a stroke, in the same unit


def random_masks(seed: int, ids: Tensor, draw: int | Tensor, size: tuple[int, int]) -> Tensor:
    """Returns float32 masks (b, 1, h, w), 1 where to inpaint, keyed by (seed, id, draw)."""
    kind, count = uniform(seed, "mask kind", ids, draw, (2,)).unbind(1)
    numbers = uniform(seed, "mask", ids, draw, (SHAPES + 1, 4)).float()  # (b, shapes + 1, 4)
    y, x = (torch.linspace(0, 1, side, device=ids.device) for side in size)
    points = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)  # (h, w, 2)
    used = torch.arange(SHAPES, device=ids.device) < 1 + (SHAPES * count).floor()[:, None]  # (b, shapes)
    inside = torch.where((kind < FULL + BOXES)[:, None, None, None], _boxes(points, numbers), _strokes(points, numbers))
    mask = (inside & used[:, :, None, None]).any(1)  # (b, h, w)
    return (mask | (kind < FULL)[:, None, None])[:, None].float()


def _boxes(points: Tensor, numbers: Tensor) -> Tensor:
    """Returns which points (h, w, 2) are inside each box: bool (b, shapes, h, w)."""
    centre, side = numbers[:, :SHAPES, :2], _between(numbers[:, :SHAPES, 2:], SIDES)
    distance = (points - centre[:, :, None, None]).abs()  # (b, shapes, h, w, 2)
    return (distance <= side[:, :, None, None] / 2).all(-1)


def _strokes(points: Tensor, numbers: Tensor) -> Tensor:
    """Returns which points (h, w, 2) are on each thick segment of a polyline: bool (b, shapes, h, w)."""
    start, step = numbers[:, :-1, None, None, :2], (numbers[:, 1:, :2] - numbers[:, :-1, :2])[:, :, None, None]
    along = ((points - start) * step).sum(-1) / step.square().sum(-1).clamp(min=1e-12)
    nearest = start + along.clamp(0, 1)[..., None] * step  # (b, shapes, h, w, 2)
    return (points - nearest).norm(dim=-1) <= _between(numbers[:, :1, None, None, 2], WIDTHS)


def _between(share: Tensor, limits: tuple[float, float]) -> Tensor:
    return limits[0] + share * (limits[1] - limits[0])
