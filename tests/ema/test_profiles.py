import numpy as np
import pytest
from scipy.integrate import quad

from ldm.ema.profiles import coefficients, decay, exponent, overlap


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25])
def test_the_exponent_gives_a_profile_of_that_standard_deviation(length: float) -> None:
    gamma = exponent(length)
    moments = [quad(lambda x, k=k: (gamma + 1) * x ** (gamma + k), 0, 1)[0] for k in range(3)]
    assert moments[0] == pytest.approx(1)
    assert (moments[2] - moments[1] ** 2) ** 0.5 == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_an_impossible_length_is_refused(length: float) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 0\.288"):
        exponent(length)


def test_decays_weight_each_step_by_the_integral_of_the_profile() -> None:
    gamma, last = exponent(0.1), 50
    weights = np.zeros(last)
    for step in range(1, last + 1):
        weights *= decay(gamma, step)
        weights[step - 1] += 1 - decay(gamma, step)
    integrals = np.diff((np.arange(last + 1) / last) ** (gamma + 1))
    np.testing.assert_allclose(weights, integrals, rtol=1e-9, atol=1e-15)


def test_the_overlap_is_the_integral_of_the_product() -> None:
    (s, g), (t, h) = (30.0, 17.0), (50.0, 7.0)
    product = quad(lambda x: (g + 1) * x**g / s ** (g + 1) * (h + 1) * x**h / t ** (h + 1), 0, s)[0]
    assert overlap(*map(np.asarray, (s, g, t, h))) == pytest.approx(product)


def test_a_snapshot_of_the_target_profile_is_used_alone() -> None:
    gammas = [exponent(0.05), exponent(0.1)] * 2
    factors, error = coefficients([50, 50, 100, 100], gammas, 100, gammas[1])
    np.testing.assert_allclose(factors, [0, 0, 0, 1], atol=1e-9)
    assert error < 1e-6


def test_the_profile_error_matches_numerical_integration() -> None:
    steps, gammas, target = [50, 100, 100], [7.0, 7.0, 17.0], 3.0
    factors, error = coefficients(steps, gammas, 100, target)

    def profile(x: float, t: float, gamma: float) -> float:
        return (gamma + 1) * x**gamma / t ** (gamma + 1) if x <= t else 0.0

    def squared_error(x: float) -> float:
        combined = sum(f * profile(x, t, g) for f, t, g in zip(factors, steps, gammas, strict=True))
        return (combined - profile(x, 100, target)) ** 2

    norm = quad(lambda x: profile(x, 100, target) ** 2, 0, 100)[0]
    assert error == pytest.approx((quad(squared_error, 0, 100, points=[50])[0] / norm) ** 0.5, rel=1e-6)
