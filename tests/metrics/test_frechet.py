import numpy as np
import pytest
import scipy.linalg
import torch

from ldm.metrics.frechet import Moments, frechet_distance, gram, moments, moments_of


def of(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    return Moments(1000, torch.from_numpy(mean), torch.from_numpy(covariance))


def by_scipy(a: Moments, b: Moments) -> float:
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    trace = np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root)
    return float((a.mean - b.mean).square().sum()) + float(trace)


def test_distance_of_diagonal_gaussians_is_that_of_means_and_standard_deviations() -> None:
    a, b = of(np.array([1.0, 2.0]), np.diag([4.0, 9.0])), of(np.array([0.0, 4.0]), np.diag([1.0, 25.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-12)


def test_distance_matches_scipy_if_the_covariances_do_not_commute() -> None:
    rng = np.random.default_rng(0)
    a, b = (of(rng.normal(size=96), x @ x.T / 96) for x in rng.normal(size=(2, 96, 200)))
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_singular_covariances_have_the_distance_of_the_closed_form() -> None:
    flat, wide = of(np.zeros(3), np.diag([4.0, 0.0, 0.0])), of(np.zeros(3), np.diag([1.0, 9.0, 0.0]))
    assert frechet_distance(flat, wide) == pytest.approx(1 + 9, rel=1e-9)
    assert frechet_distance(of(np.zeros(3), np.zeros((3, 3))), wide) == pytest.approx(10, rel=1e-9)


def test_fewer_samples_than_dimensions_match_the_distance_of_low_rank_factors() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 10, 40))
    a, b = (moments_of(torch.from_numpy(z)) for z in (x, y))
    centered = [(z - z.mean(0)) / 3 for z in (x, y)]  # covariance is zᵀz
    trace = sum(np.square(z).sum() for z in centered) - 2 * np.linalg.norm(centered[0] @ centered[1].T, "nuc")
    assert frechet_distance(a, b) == pytest.approx(np.square(x.mean(0) - y.mean(0)).sum() + trace, rel=1e-6)


def test_summed_gram_matrices_of_parts_give_the_moments_of_all_features() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(3, 2, size=(57, 5)))
    found = moments(gram(x[:20]) + gram(x[20:21]) + gram(x[21:]))
    assert found.count == 57
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(x.numpy().T), rtol=1e-12)


def test_float32_features_far_from_zero_keep_their_covariance() -> None:
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) + 100
    np.testing.assert_allclose(moments_of(x).covariance, np.cov(x.double().numpy().T), rtol=1e-9, atol=1e-9)


def test_a_single_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least two images, not 1"):
        moments_of(torch.zeros(1, 3))
