import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.metrics.kid import kid


def normal(n: int, shift: float, seed: int) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)) + shift


def pair_by_pair(x: np.ndarray, y: np.ndarray) -> float:
    """Computes KID by its definition, with loops."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    within = [np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]) for z in (x, y)]
    return float(sum(within) - 2 * np.mean([k(a, b) for a in x for b in y]))


def test_kid_matches_its_definition_for_any_block_size() -> None:
    x, y = normal(13, 0, 0), normal(9, 0.5, 1)
    expected = pair_by_pair(x.double().numpy(), y.double().numpy())
    assert [kid(x, y, block) for block in (4, 100)] == pytest.approx([expected] * 2, rel=1e-12)


def test_kid_of_two_sets_from_one_distribution_is_zero_in_expectation() -> None:
    values = [kid(normal(30, 0, 2 * i), normal(30, 0, 2 * i + 1)) for i in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)
    assert min(values) < 0


def test_kid_grows_with_the_distance_between_the_distributions() -> None:
    assert kid(normal(50, 0, 0), normal(50, 0.2, 1)) < kid(normal(50, 0, 0), normal(50, 1, 1))


def test_a_single_image_is_refused() -> None:
    with pytest.raises(ValueError, match="not 1 real and 9 generated"):
        kid(normal(1, 0, 0), normal(9, 0, 1))
