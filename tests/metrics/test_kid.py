import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.metrics.kid import kid


def drawn(n: int, shift: float, seed: int) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)) + shift


def pair_by_pair(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, with loops."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    within = [np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]) for z in (x, y)]
    return float(sum(within) - 2 * np.mean([k(a, b) for a in x for b in y]))


def test_it_is_its_definition_whatever_the_blocks() -> None:
    x, y = drawn(13, 0, 0), drawn(9, 0.5, 1)
    expected = pair_by_pair(x.double().numpy(), y.double().numpy())
    assert [kid(x, y, block) for block in (4, 100)] == pytest.approx([expected] * 2, rel=1e-12)


def test_sets_of_one_distribution_have_an_expectation_of_zero() -> None:
    values = [kid(drawn(30, 0, 2 * i), drawn(30, 0, 2 * i + 1)) for i in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)
    assert min(values) < 0


def test_it_grows_with_the_distance() -> None:
    assert kid(drawn(50, 0, 0), drawn(50, 0.2, 1)) < kid(drawn(50, 0, 0), drawn(50, 1, 1))


def test_a_single_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="not 1 real and 9 generated"):
        kid(drawn(1, 0, 0), drawn(9, 0, 1))
