"""Random masks to train inpainting with: boxes, strokes, or the whole image (Suvorov et al. 2022)."""

import torch
from torch import Tensor

from ldm.random import uniform

WHOLE, BOXES = 0.25, 0.375  # shares of the masks; the rest are strokes
SHAPES = 4  # boxes, or segments of a stroke, at most
SIDES = 0.15, 0.6  # of a box, as shares of the image's
WIDTHS = 0.03, 0.12  # half the width of a stroke, likewise


def random_masks(seed: int, ids: Tensor, draw: int | Tensor, size: tuple[int, int]) -> Tensor:
    """float32 (b, 1, h, w), 1 where to repaint, keyed by (seed, id, draw)."""
    kind, count = uniform(seed, "mask kind", ids, draw, (2,)).unbind(1)
    numbers = uniform(seed, "mask", ids, draw, (SHAPES + 1, 4)).float()  # (b, shapes + 1, 4)
    y, x = (torch.linspace(0, 1, side, device=ids.device) for side in size)
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)  # (h, w, 2)
    used = torch.arange(SHAPES, device=ids.device) < 1 + (SHAPES * count).floor()[:, None]  # (b, shapes)
    inside = torch.where(
        (kind < WHOLE + BOXES)[:, None, None, None], _boxes(places, numbers), _strokes(places, numbers)
    )
    mask = (inside & used[:, :, None, None]).any(1)  # (b, h, w)
    return (mask | (kind < WHOLE)[:, None, None])[:, None].float()


def _boxes(places: Tensor, numbers: Tensor) -> Tensor:
    """Which places (h, w, 2) lie in each box: bool (b, shapes, h, w)."""
    centre, side = numbers[:, :SHAPES, :2], _between(numbers[:, :SHAPES, 2:], SIDES)
    away = (places - centre[:, :, None, None]).abs()  # (b, shapes, h, w, 2)
    return (away <= side[:, :, None, None] / 2).all(-1)


def _strokes(places: Tensor, numbers: Tensor) -> Tensor:
    """Which places lie near each segment of a polyline: bool (b, shapes, h, w)."""
    start, step = numbers[:, :-1, None, None, :2], (numbers[:, 1:, :2] - numbers[:, :-1, :2])[:, :, None, None]
    along = ((places - start) * step).sum(-1) / step.square().sum(-1).clamp(min=1e-12)
    nearest = start + along.clamp(0, 1)[..., None] * step  # (b, shapes, h, w, 2)
    return (places - nearest).norm(dim=-1) <= _between(numbers[:, :1, None, None, 2], WIDTHS)


def _between(share: Tensor, ends: tuple[float, float]) -> Tensor:
    return ends[0] + share * (ends[1] - ends[0])
