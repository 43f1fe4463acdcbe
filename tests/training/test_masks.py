"""Random masks: three kinds with their shares, keyed by the sample."""

import torch
from torch import Tensor

from ldm.training.masks import BOXES, WHOLE, random_masks

COUNT, SIZE = 2000, (32, 24)


def masks(count: int = COUNT, seed: int = 0, draw: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    return random_masks(seed, torch.arange(count), draw, size)


def is_whole(mask: Tensor) -> Tensor:
    return mask.flatten(1).bool().all(1)


def is_boxes(mask: Tensor) -> Tensor:
    """Whether a mask (b, 1, h, w) is a union of at most four axis-parallel boxes: none of its rows has more than nine
    runs of equal pixels, and at most eight rows differ from the one above."""
    rows = mask[:, 0].bool()
    runs = (rows[:, :, 1:] != rows[:, :, :-1]).sum(2).amax(1)
    changes = (rows[:, 1:] != rows[:, :-1]).any(2).sum(1)
    return (runs <= 8) & (changes <= 8)


def tolerance(share: float) -> float:
    """Four standard deviations of the share that is found in COUNT masks."""
    return 4 * (share * (1 - share) / COUNT) ** 0.5


def test_masks_are_zeros_and_ones_of_the_size_of_the_image() -> None:
    found = masks(50)
    assert found.shape == (50, 1, *SIZE) and found.dtype == torch.float32
    assert set(found.unique().tolist()) == {0.0, 1.0}


def test_a_quarter_of_the_masks_cover_the_whole_image() -> None:
    assert abs(float(is_whole(masks()).double().mean()) - WHOLE) < tolerance(WHOLE)


def test_boxes_and_strokes_share_the_rest() -> None:
    """Of tall images, in which a stroke changes nearly every row that it crosses; a few strokes are level."""
    found = masks(size=(256, 24))
    boxes = float((is_boxes(found) & ~is_whole(found)).double().mean())
    level = 0.1 * (1 - WHOLE - BOXES)
    assert BOXES - tolerance(BOXES) < boxes < BOXES + level + tolerance(BOXES)


def test_no_mask_is_empty() -> None:
    assert (masks().flatten(1).sum(1) > 0).double().mean() > 0.999  # a box may lie between two pixels


def test_a_mask_is_decided_by_the_seed_the_sample_and_the_draw_alone() -> None:
    together = masks(8)
    alone = torch.cat([random_masks(0, torch.tensor([i]), 0, SIZE) for i in range(8)])
    assert torch.equal(together, alone)
    backwards = random_masks(0, torch.arange(8).flip(0), torch.zeros(8).long(), SIZE)
    assert torch.equal(backwards.flip(0), together)


def test_another_seed_draw_or_sample_has_another_mask() -> None:
    first, others = masks(200), (masks(200, seed=1), masks(200, draw=1), masks(201)[1:])
    for other in others:
        same = (first == other).flatten(1).all(1).double().mean()
        assert same < 0.12  # 1/16 of the pairs are both whole


def test_a_mask_means_the_same_place_at_every_resolution() -> None:
    small, large = masks(100, size=(33, 33)), masks(100, size=(65, 65))  # whose every second pixel is the small one's
    assert (small == large[:, :, ::2, ::2]).double().mean() > 0.999


def test_masks_cover_from_a_little_to_nearly_all_of_the_image() -> None:
    found = masks()
    shares = found[~is_whole(found)].mean((1, 2, 3))
    assert float(shares.quantile(0.05)) < 0.1 and float(shares.quantile(0.95)) > 0.4
    assert 0.15 < float(shares.mean()) < 0.4
