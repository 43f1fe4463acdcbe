import pytest
import torch

from ldm.diffusion.prediction import COEFFICIENTS, Prediction, per_sample
from tests.closed_form import EVERY_SCHEDULE, SCHEDULES, schedule_name, states

X0, EPS = states(), states().flip(0)


def noised(schedule, t):
    time = torch.full((len(X0),), t, dtype=torch.float64)
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    return alpha, sigma, per_sample(alpha, X0) * X0 + per_sample(sigma, X0) * EPS


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_every_prediction_type_gives_back_the_same_data_and_noise(schedule, name):
    prediction = Prediction(name)
    for share in (0.05, 0.5, 0.95):
        alpha, sigma, x = noised(schedule, share * schedule.t_max)
        out = prediction.target(X0, EPS, alpha, sigma)
        torch.testing.assert_close(prediction.to_x0(x, out, alpha, sigma), X0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(prediction.to_eps(x, out, alpha, sigma), EPS, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["x0", "v", "flow"])
def test_data_come_back_exactly_from_pure_noise(name):
    alpha, sigma = torch.zeros(64).double(), torch.ones(64).double()
    prediction = Prediction(name)
    out = prediction.target(X0, EPS, alpha, sigma)
    torch.testing.assert_close(prediction.to_x0(EPS, out, alpha, sigma), X0, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_data_come_back_exactly_at_the_clean_end(name):
    alpha, sigma = torch.ones(64).double(), torch.zeros(64).double()
    prediction = Prediction(name)
    out = prediction.target(X0, EPS, alpha, sigma)
    assert torch.equal(prediction.to_x0(X0, out, alpha, sigma), X0)


def test_noise_comes_back_exactly_from_pure_noise_under_eps():
    alpha, sigma = torch.zeros(64).double(), torch.ones(64).double()
    assert torch.equal(Prediction("eps").to_eps(EPS, EPS, alpha, sigma), EPS)


def whole_range(schedule):
    """alpha and sigma (1002,) from end to end, with the two levels beside them that are hardest to round."""
    t = torch.linspace(schedule.t_min, schedule.t_max, 1000, dtype=torch.float64)
    near = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.tensor([1e-6, 1 - 1e-6], dtype=torch.float64)
    t = torch.cat((t, near))
    return schedule.alpha(t), schedule.sigma(t)


def told_by(name, alpha, sigma):
    """Where `name` tells data and noise both: not eps without signal, nor x0 without noise."""
    return {"eps": alpha > 0, "x0": sigma > 0}.get(name, alpha >= 0)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_every_output_becomes_every_other_over_the_whole_range(schedule, name):
    alpha, sigma = whole_range(schedule)
    alpha, sigma = (level[told_by(name, *whole_range(schedule))] for level in (alpha, sigma))
    x0, eps = (
        torch.randn(len(alpha), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    x = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps
    out = Prediction(name).target(x0, eps, alpha, sigma)
    divisor = Prediction(name).determinant(alpha, sigma).abs().clamp(max=1).view(-1, 1)
    for other in map(Prediction, COEFFICIENTS):
        error = Prediction(name).to(other, x, out, alpha, sigma) - other.target(x0, eps, alpha, sigma)
        assert (error.abs() * divisor < 1e-14).all(), other.name


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_float32_stays_within_its_stated_bound_of_float64_over_the_whole_range(schedule, name):
    alpha, sigma = whole_range(schedule)
    alpha, sigma = (level[told_by(name, *whole_range(schedule))] for level in (alpha, sigma))
    x, out = (torch.randn(len(alpha), 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    one, zero = torch.ones(len(alpha), 1, dtype=torch.float64), torch.zeros(len(alpha), 1, dtype=torch.float64)
    for other in map(Prediction, COEFFICIENTS):
        p, q = (abs(Prediction(name).to(other, a, b, alpha, sigma)) for a, b in ((one, zero), (zero, one)))
        exact = Prediction(name).to(other, x.double(), out.double(), alpha, sigma)
        error = (Prediction(name).to(other, x, out, alpha, sigma) - exact).abs()
        assert (error <= 4 * 2.0**-24 * (p * x.abs() + q * out.abs())).all(), other.name
        if name in ("v", "flow"):
            assert (p + q).max() <= 2.5


@pytest.mark.parametrize(("schedule", "most"), [(SCHEDULES[0], 7e-6), (SCHEDULES[2], 1e-2)], ids=["sd", "cosine"])
def test_data_from_eps_are_as_inexact_as_stated_at_the_end_of_a_table(schedule, most):
    end = torch.full((1,), schedule.t_max)
    alpha, sigma = schedule.alpha(end), schedule.sigma(end)
    bound = 4 * 2.0**-24 * float((1 + sigma) / alpha)
    assert 0.5 * most < bound <= most


def test_v_is_the_angular_velocity_of_the_variance_preserving_path():
    angle = torch.full((64,), 0.7, dtype=torch.float64)
    v = Prediction("v").target(X0, EPS, angle.cos(), angle.sin())
    step = 1e-6
    ahead, behind = (torch.cos(angle + h).view(-1, 1, 1, 1) * X0 for h in (step, -step))
    ahead, behind = (
        part + torch.sin(angle + h).view(-1, 1, 1, 1) * EPS for part, h in ((ahead, step), (behind, -step))
    )
    torch.testing.assert_close(v, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)


def test_the_answer_has_the_type_of_the_state():
    alpha, sigma = torch.full((64,), 0.6).double(), torch.full((64,), 0.8).double()
    for name in COEFFICIENTS:
        assert Prediction(name).to_x0(X0.float(), EPS.bfloat16(), alpha, sigma).dtype == torch.float32


def test_an_unknown_prediction_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'epsilon', but must be one of eps, x0, v, flow"):
        Prediction("epsilon")
