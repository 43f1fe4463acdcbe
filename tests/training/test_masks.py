"""Tests the three kinds of random masks, their shares and their keys."""

import pytest
import torch
from torch import Tensor

from ldm.training.masks import BOXES, FULL, random_masks

COUNT, SIZE = 2000, (32, 24)


def masks(count: int = COUNT, seed: int = 0, draw: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    return random_masks(seed, torch.arange(count), draw, size)


def is_full(mask: Tensor) -> Tensor:
    return mask.flatten(1).bool().all(1)


def is_boxes(mask: Tensor) -> Tensor:
    """Returns which masks (b, 1, h, w) may be a union of at most four axis-parallel boxes: no row has more than nine
    runs of equal pixels, and at most eight rows differ from the row above."""
    rows = mask[:, 0].bool()
    runs = (rows[:, :, 1:] != rows[:, :, :-1]).sum(2).amax(1)
    changes = (rows[:, 1:] != rows[:, :-1]).any(2).sum(1)
    return (runs <= 8) & (changes <= 8)


def tolerance(share: float) -> float:
    """Returns four standard deviations of the share among COUNT masks."""
    return 4 * (share * (1 - share) / COUNT) ** 0.5


def test_masks_are_zeros_and_ones_of_the_image_size() -> None:
    sample = masks(50)
    assert sample.shape == (50, 1, *SIZE) and sample.dtype == torch.float32
    assert set(sample.unique().tolist()) == {0.0, 1.0}


def test_a_quarter_of_the_masks_cover_the_full_image() -> None:
    assert abs(float(is_full(masks()).double().mean()) - FULL) < tolerance(FULL)


@pytest.mark.slow
def test_the_remaining_masks_are_boxes_and_strokes() -> None:
    """Uses tall images, where a stroke changes nearly every row that it crosses; a few strokes are horizontal."""
    tall = masks(size=(256, 24))
    boxes = float((is_boxes(tall) & ~is_full(tall)).double().mean())
    horizontal = 0.1 * (1 - FULL - BOXES)
    assert BOXES - tolerance(BOXES) < boxes < BOXES + horizontal + tolerance(BOXES)


def test_no_mask_is_empty() -> None:
    assert (masks().flatten(1).sum(1) > 0).double().mean() > 0.999  # a box may fall between two pixels


def test_a_mask_depends_only_on_seed_sample_and_draw() -> None:
    together = masks(8)
    alone = torch.cat([random_masks(0, torch.tensor([i]), 0, SIZE) for i in range(8)])
    assert torch.equal(together, alone)
    backwards = random_masks(0, torch.arange(8).flip(0), torch.zeros(8).long(), SIZE)
    assert torch.equal(backwards.flip(0), together)


def test_other_seeds_draws_and_samples_have_other_masks() -> None:
    first, others = masks(200), (masks(200, seed=1), masks(200, draw=1), masks(201)[1:])
    for other in others:
        same = (first == other).flatten(1).all(1).double().mean()
        assert same < 0.12  # in 1/16 of the pairs both are full


def test_a_mask_covers_the_same_area_at_every_resolution() -> None:
    small, large = (
        masks(100, size=(33, 33)),
        masks(100, size=(65, 65)),
    )  # large[::2] is on the grid of small
    assert (small == large[:, :, ::2, ::2]).double().mean() > 0.999


def test_masks_cover_between_a_little_and_most_of_the_image() -> None:
    sample = masks()
    shares = sample[~is_full(sample)].mean((1, 2, 3))
    assert float(shares.quantile(0.05)) < 0.1 and float(shares.quantile(0.95)) > 0.4
    assert 0.15 < float(shares.mean()) < 0.4
