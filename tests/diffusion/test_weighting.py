import pytest
import torch

from ldm.diffusion.prediction import COEFFICIENTS, Prediction
from ldm.diffusion.weighting import (
    WEIGHTINGS,
    Weighting,
    debiased,
    edm,
    min_snr,
    p2,
    sigmoid,
    soft_min_snr,
    uniform,
)
from tests.closed_form import SCHEDULES, schedule_name

ONE, ZERO = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


def weight_of_output(weighting, alpha, sigma, name):
    return float(weighting(alpha, sigma, Prediction(name)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
@pytest.mark.parametrize("space", ["x0", "eps"])
def test_the_weighted_error_does_not_depend_on_the_prediction_type(schedule, space):
    """An error d in x0 is an error -alpha/sigma·d in eps, and a·d - b·alpha/sigma·d in the output."""
    weighting = Weighting("test", space, lambda log_snr: 1 + log_snr.sigmoid())
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64) * schedule.t_max
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    error = torch.ones_like(t) if space == "x0" else -alpha / sigma
    expected = weighting.weight(schedule.log_snr(t)) * error**2
    for name in COEFFICIENTS:
        a, b = Prediction(name).coefficients(alpha, sigma)
        error_of_output = a - b * alpha / sigma
        actual = weighting(alpha, sigma, Prediction(name)) * error_of_output**2
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def test_uniform_is_one_everywhere():
    for name in COEFFICIENTS:
        assert [weight_of_output(uniform(), a, s, name) for a, s in ((ONE, ZERO), (ZERO, ONE))] == [1, 1]


@pytest.mark.parametrize("snr", [0.01, 5.0, 300.0])
def test_min_snr_follows_the_formulas_of_the_paper_for_eps_x0_and_v(snr):
    alpha, sigma = (
        (torch.tensor([snr / (1 + snr)]).double()).sqrt(),
        (torch.tensor([1 / (1 + snr)]).double()).sqrt(),
    )
    clipped = min(snr, 5.0)
    assert weight_of_output(min_snr(), alpha, sigma, "x0") == pytest.approx(clipped, rel=1e-6)
    assert weight_of_output(min_snr(), alpha, sigma, "eps") == pytest.approx(clipped / snr, rel=1e-6)
    assert weight_of_output(min_snr(), alpha, sigma, "v") == pytest.approx(clipped / (snr + 1), rel=1e-6)


def test_at_pure_noise_min_snr_is_one_for_eps_and_zero_for_the_others():
    assert weight_of_output(min_snr(), ZERO, ONE, "eps") == pytest.approx(1, rel=1e-9)
    for name in ("x0", "v", "flow"):
        assert weight_of_output(min_snr(), ZERO, ONE, name) == pytest.approx(0, abs=1e-100)


def test_at_the_clean_end_min_snr_is_gamma_for_x0_and_zero_for_the_others():
    assert weight_of_output(min_snr(gamma=3.0), ONE, ZERO, "x0") == pytest.approx(3, rel=1e-9)
    for name in ("eps", "v", "flow"):
        assert weight_of_output(min_snr(), ONE, ZERO, name) == pytest.approx(0, abs=1e-100)


def preserving(snr):
    """alpha and sigma (1,) of the variance-preserving path."""
    return tuple(torch.tensor([square], dtype=torch.float64).sqrt() for square in (snr / (1 + snr), 1 / (1 + snr)))


# The weight of the squared error of eps as a function of SNR, as written in the code of each paper.
ON_EPS = {
    "min_snr": (min_snr(3.0), lambda snr: min(snr, 3.0) / snr),
    "soft_min_snr": (soft_min_snr(4.0), lambda snr: 1 / (1 / snr + 1 / 4) / snr),
    "edm": (edm(0.5), lambda snr: (snr**-1 + 0.25) / (snr**-0.5 * 0.5) ** 2 / snr),
    "p2": (p2(0.5, k=2.0), lambda snr: 1 / (2 + snr) ** 0.5),
    "sigmoid": (sigmoid(bias=1.0), lambda snr: 1 / (1 + snr / 2.718281828459045)),
    "debiased": (debiased(), lambda snr: 1 / snr**0.5),
}


@pytest.mark.parametrize("snr", [1e-8, 0.01, 1.0, 5.0, 1e8])
@pytest.mark.parametrize(("weighting", "paper"), ON_EPS.values(), ids=ON_EPS)
def test_a_weighting_matches_its_paper_for_every_prediction_type(weighting, paper, snr):
    alpha, sigma = preserving(snr)
    assert weight_of_output(weighting, alpha, sigma, "eps") == pytest.approx(paper(snr), rel=1e-6)
    assert weight_of_output(weighting, alpha, sigma, "x0") == pytest.approx(paper(snr) * snr, rel=1e-6)
    assert weight_of_output(weighting, alpha, sigma, "v") == pytest.approx(paper(snr) * snr / (snr + 1), rel=1e-6)


# Weights at pure noise (alpha = 0) and at the clean end (sigma = 0); v and flow have the same limits.
LIMITS = {
    "uniform": {"eps": (1, 1), "x0": (1, 1), "v": (1, 1)},
    "min_snr": {"eps": (1, 0), "x0": (0, 5), "v": (0, 0)},
    "soft_min_snr": {"eps": (1, 0), "x0": (0, 5), "v": (0, 0)},
    "edm": {"eps": (1e300, 1), "x0": (1, 1e300), "v": (1, 1)},
    "p2": {"eps": (1, 0), "x0": (0, 1), "v": (0, 0)},
    "sigmoid": {"eps": (1, 0), "x0": (0, 7.38905609893), "v": (0, 0)},
    "debiased": {"eps": (1e150, 0), "x0": (0, 1e150), "v": (0, 0)},
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_at_both_ends_are_their_limits_or_huge_if_infinite(name):
    limits = LIMITS[name]
    for prediction, expected in (limits | {"flow": limits["v"]}).items():
        ends = [weight_of_output(WEIGHTINGS[name](), *end, prediction) for end in ((ZERO, ONE), (ONE, ZERO))]
        assert ends == pytest.approx(list(expected), rel=1e-6, abs=1e-100)
        near = [weight_of_output(WEIGHTINGS[name](), *preserving(snr), prediction) for snr in (1e-14, 1e14)]
        for limit, close in zip(expected, near, strict=True):
            assert close == pytest.approx(limit, rel=1e-5, abs=1e-5) if limit < 1e100 else close > 1e5


def test_the_edm_weighting_of_v_prediction_is_uniform():
    for snr in (1e-9, 0.3, 1e9):
        assert weight_of_output(edm(), *preserving(snr), "v") == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: min_snr(gamma=0), "min_snr's gamma is 0"),
        (lambda: soft_min_snr(gamma=-1), "soft_min_snr's gamma is -1"),
        (lambda: edm(sigma_data=torch.nan), "edm's sigma_data is nan"),
        (lambda: p2(gamma=1, k=0), "p2's k is 0"),
        (lambda: sigmoid(bias=torch.nan), "sigmoid's bias is nan"),
    ],
)
def test_invalid_weighting_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
