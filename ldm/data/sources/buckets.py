"""Aspect-ratio buckets: a few sizes of about equal area, so that pictures are cropped little and never padded.

As in NovelAI's "Improvements on Stable Diffusion" (2022), with the area bounded by a square's.
"""

from collections.abc import Sequence
from math import log

Size = tuple[int, int]  # height, width
WIDEST = 2.0  # width / height, and its inverse


def bucket_sizes(side: int, step: int) -> list[Size]:
    """Sides in multiples of `step`, for each height the widest with no more pixels than side², by rising height.

    Raises ValueError where `side` is no multiple of `step`, for then the square would not be among them.
    """
    if step < 1 or side % step:
        raise ValueError(f"buckets in steps of {step} pixels hold no square of {side}: give a divisor of {side}")
    sizes = ((height, side * side // height // step * step) for height in range(step, 2 * side + 1, step))
    return [(height, width) for height, width in sizes if width and 1 / WIDEST <= width / height <= WIDEST]


def nearest(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest, by its logarithm; the first of equals."""
    return min(sizes, key=lambda size: abs(log(width / height) - log(size[1] / size[0])))
