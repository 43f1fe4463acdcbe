import pytest
import torch

from ldm.diffusion.prediction import COEFFICIENTS, Prediction
from ldm.diffusion.weighting import Weighting, min_snr, uniform
from tests.closed_form import SCHEDULES, schedule_name

ONE, ZERO = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


def weight_of_output(weighting, alpha, sigma, name):
    return float(weighting(alpha, sigma, Prediction(name)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
@pytest.mark.parametrize("space", ["x0", "eps"])
def test_a_weighted_error_is_the_same_through_every_prediction_type(schedule, space):
    """An error of x0 by d is one of eps by -alpha/sigma·d, and of the output by a·d - b·alpha/sigma·d."""
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
def test_min_snr_is_the_paper_s_formula_for_eps_x0_and_v(snr):
    alpha, sigma = (
        (torch.tensor([snr / (1 + snr)]).double()).sqrt(),
        (torch.tensor([1 / (1 + snr)]).double()).sqrt(),
    )
    clipped = min(snr, 5.0)
    assert weight_of_output(min_snr(), alpha, sigma, "x0") == pytest.approx(clipped, rel=1e-6)
    assert weight_of_output(min_snr(), alpha, sigma, "eps") == pytest.approx(clipped / snr, rel=1e-6)
    assert weight_of_output(min_snr(), alpha, sigma, "v") == pytest.approx(clipped / (snr + 1), rel=1e-6)


def test_at_pure_noise_min_snr_gives_one_to_eps_and_nothing_to_the_others():
    assert weight_of_output(min_snr(), ZERO, ONE, "eps") == pytest.approx(1, rel=1e-9)
    for name in ("x0", "v", "flow"):
        assert weight_of_output(min_snr(), ZERO, ONE, name) == pytest.approx(0, abs=1e-100)


def test_at_the_clean_end_min_snr_gives_gamma_to_x0_and_nothing_to_the_others():
    assert weight_of_output(min_snr(gamma=3.0), ONE, ZERO, "x0") == pytest.approx(3, rel=1e-9)
    for name in ("eps", "v", "flow"):
        assert weight_of_output(min_snr(), ONE, ZERO, name) == pytest.approx(0, abs=1e-100)


def test_gamma_must_be_positive():
    with pytest.raises(ValueError, match="gamma is 0"):
        min_snr(gamma=0)
