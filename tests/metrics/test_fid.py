import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from ldm.metrics.fid import FID, feature_fid, fid, fid_infinity


class Pixels(nn.Module):
    """A feature network that returns the pixels."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.double().flatten(1)


def closed_form(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root))


def gaussian(mean: np.ndarray, cov: np.ndarray, seed: int) -> Tensor:
    """Returns 200 samples whose empirical mean and covariance are exactly those given."""
    x = np.random.default_rng(seed).normal(size=(200, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x @ np.linalg.cholesky(cov).T + mean).view(200, 3, 2, 2)


def test_fid_of_gaussian_samples_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(2, 12))
    covs = [a @ a.T + 0.1 * np.eye(12) for a in rng.normal(size=(2, 12, 12))]
    real, fake = (gaussian(mean, cov, seed) for seed, (mean, cov) in enumerate(zip(means, covs, strict=True)))
    value = fid(real.split(64), fake.split(30), Pixels())
    assert value == pytest.approx(closed_form(means[0], covs[0], means[1], covs[1]), rel=1e-9)


def test_fid_of_images_is_the_closed_form_with_moments_from_numpy() -> None:
    rng = np.random.default_rng(0)
    real, fake = (torch.from_numpy(rng.integers(low, 256, (100, 3, 2, 2), np.uint8)) for low in (0, 90))
    x, y = (images.flatten(1).double().numpy() for images in (real, fake))
    expected = closed_form(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert fid([real], [fake], Pixels()) == pytest.approx(expected, rel=1e-9)


def test_shifting_every_feature_by_one_gives_a_fid_equal_to_their_number() -> None:
    real = gaussian(np.zeros(12), np.eye(12), seed=0)
    assert fid([real], [real + 1], Pixels()) == pytest.approx(12)


def test_no_more_images_than_features_is_a_warning() -> None:
    images = gaussian(np.zeros(12), np.eye(12), seed=0)
    with pytest.warns(UserWarning, match="200 real and 12 generated images is .* biased, because there are 12 feat"):
        fid([images], [images[:12]], Pixels())


def test_a_single_image_is_refused() -> None:
    images = gaussian(np.zeros(12), np.eye(12), seed=0)
    with pytest.raises(ValueError, match="not 1 real and 200 generated"):
        fid([images[:1]], [images], Pixels())


def test_features_that_are_nan_are_refused() -> None:
    metric = FID(12, sync=False)
    with pytest.raises(ValueError, match="1 of 2 generated images have features that are NaN"):
        metric.update(torch.tensor([[0.0] * 12, [torch.nan] * 12]), real=False)


def test_extrapolating_fid_removes_most_of_its_bias() -> None:
    """FID's bias is proportional to 1/m; for a Gaussian against itself the limit is 0, which no finite m reaches."""
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (200_000, 4000))
    plain, limit = feature_fid(real, fake), fid_infinity(real, fake)
    assert abs(limit) < plain / 3


def test_extrapolating_fid_from_too_few_images_is_refused() -> None:
    with pytest.raises(ValueError, match="30 generated images, not 20"):
        fid_infinity(torch.zeros(50, 2), torch.zeros(20, 2))
