"""Computes aspect-ratio buckets: sizes of about equal area, so that images are cropped little and never padded.

As in NovelAI's "Improvements on Stable Diffusion" (2022), with the area bounded by that of a square.
"""

from collections.abc import Sequence
from math import log

Size = tuple[int, int]  # height, width
WIDEST = 2.0  # bound on width / height and on its inverse


def bucket_sizes(side: int, step: int) -> list[Size]:
    """Returns, for each height, the widest size with at most side² pixels and sides that are multiples of `step`.

    Sizes are sorted by height. Raises ValueError if `side` is not a multiple of `step`, because the square would be
    missing.
    """
    if step < 1 or side % step:
        raise ValueError(f"buckets in steps of {step} pixels include no square of {side}: give a divisor of {side}")
    sizes = ((height, side * side // height // step * step) for height in range(step, 2 * side + 1, step))
    return [(height, width) for height, width in sizes if width and 1 / WIDEST <= width / height <= WIDEST]


def nearest(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Returns the size with the nearest logarithm of the aspect ratio, the first of them in a tie."""
    return min(sizes, key=lambda size: abs(log(width / height) - log(size[1] / size[0])))
