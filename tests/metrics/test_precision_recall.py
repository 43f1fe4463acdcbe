import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.metrics.precision_recall import precision_recall


def share_within(queries: np.ndarray, points: np.ndarray, k: int) -> float:
    """Computes the share by its definition, with loops."""
    radii = [sorted(np.linalg.norm(points - p, axis=1))[k] for p in points]
    inside = [any(np.linalg.norm(q - p) <= r for p, r in zip(points, radii, strict=True)) for q in queries]
    return float(np.mean(inside))


def normal(n: int, shift: float, seed: int) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


@pytest.mark.parametrize("block", [7, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_match_their_definition_for_any_block_size(k: int, block: int) -> None:
    real, fake = normal(40, 0, 0), normal(30, 1, 1)
    found = precision_recall(real, fake, k, block)
    expected = share_within(fake.numpy(), real.numpy(), k), share_within(real.numpy(), fake.numpy(), k)
    assert (found["precision"], found["recall"]) == expected
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1


def test_identical_sets_have_full_precision_and_recall() -> None:
    assert precision_recall(normal(20, 0, 0), normal(20, 0, 0)) == {"precision": 1, "recall": 1}


def test_covering_one_of_two_modes_has_precision_without_recall() -> None:
    modes = torch.cat([normal(50, 0, 0), normal(50, 100, 1)])
    found = precision_recall(modes, normal(50, 0, 2) * 0.5)
    assert found["precision"] > 0.9 and found["recall"] <= 0.5


def test_distant_sets_have_no_precision_and_no_recall() -> None:
    assert precision_recall(normal(20, 0, 0), normal(20, 1000, 1)) == {"precision": 0, "recall": 0}


def test_fewer_images_than_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="need at least 4 images on each side, not 3 real and 20 generated"):
        precision_recall(normal(3, 0, 0), normal(20, 0, 0))
