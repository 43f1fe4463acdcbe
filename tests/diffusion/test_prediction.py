import pytest
import torch

from ldm.diffusion.prediction import COEFFICIENTS, Prediction, per_sample
from tests.closed_form import EVERY_SCHEDULE, SCHEDULES, schedule_name, states

X0, EPS = states(), states().flip(0)


def noisy(schedule, t):
    time = torch.full((len(X0),), t, dtype=torch.float64)
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    return alpha, sigma, per_sample(alpha, X0) * X0 + per_sample(sigma, X0) * EPS


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_x0_and_eps_are_recovered_from_every_prediction_type(schedule, name):
    prediction = Prediction(name)
    for fraction in (0.05, 0.5, 0.95):
        alpha, sigma, x = noisy(schedule, fraction * schedule.t_max)
        out = prediction.target(X0, EPS, alpha, sigma)
        torch.testing.assert_close(prediction.to_x0(x, out, alpha, sigma), X0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(prediction.to_eps(x, out, alpha, sigma), EPS, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["x0", "v", "flow"])
def test_x0_is_recovered_exactly_at_pure_noise(name):
    alpha, sigma = torch.zeros(64).double(), torch.ones(64).double()
    prediction = Prediction(name)
    out = prediction.target(X0, EPS, alpha, sigma)
    torch.testing.assert_close(prediction.to_x0(EPS, out, alpha, sigma), X0, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_x0_is_recovered_exactly_at_the_clean_end(name):
    alpha, sigma = torch.ones(64).double(), torch.zeros(64).double()
    prediction = Prediction(name)
    out = prediction.target(X0, EPS, alpha, sigma)
    assert torch.equal(prediction.to_x0(X0, out, alpha, sigma), X0)


def test_eps_prediction_recovers_eps_exactly_at_pure_noise():
    alpha, sigma = torch.zeros(64).double(), torch.ones(64).double()
    assert torch.equal(Prediction("eps").to_eps(EPS, EPS, alpha, sigma), EPS)


def full_range(schedule):
    """alpha and sigma (1002,) over all times, including two close to the ends, where rounding is worst."""
    t = torch.linspace(schedule.t_min, schedule.t_max, 1000, dtype=torch.float64)
    near = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.tensor([1e-6, 1 - 1e-6], dtype=torch.float64)
    t = torch.cat((t, near))
    return schedule.alpha(t), schedule.sigma(t)


def invertible(name, alpha, sigma):
    """Covers outputs that determine both x0 and eps: eps does not at alpha = 0, nor x0 at sigma = 0."""
    return {"eps": alpha > 0, "x0": sigma > 0}.get(name, alpha >= 0)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_every_prediction_type_converts_to_every_other_at_all_times(schedule, name):
    alpha, sigma = full_range(schedule)
    alpha, sigma = (level[invertible(name, *full_range(schedule))] for level in (alpha, sigma))
    x0, eps = (
        torch.randn(len(alpha), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    x = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps
    out = Prediction(name).target(x0, eps, alpha, sigma)
    divisor = Prediction(name).determinant(alpha, sigma).abs().clamp(max=1).view(-1, 1)
    for other in map(Prediction, COEFFICIENTS):
        error = Prediction(name).convert(other, x, out, alpha, sigma) - other.target(x0, eps, alpha, sigma)
        assert (error.abs() * divisor < 1e-14).all(), other.name


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_float32_conversion_is_within_the_documented_bound_at_all_times(schedule, name):
    alpha, sigma = full_range(schedule)
    alpha, sigma = (level[invertible(name, *full_range(schedule))] for level in (alpha, sigma))
    x, out = (torch.randn(len(alpha), 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    one, zero = torch.ones(len(alpha), 1, dtype=torch.float64), torch.zeros(len(alpha), 1, dtype=torch.float64)
    for other in map(Prediction, COEFFICIENTS):
        p, q = (abs(Prediction(name).convert(other, a, b, alpha, sigma)) for a, b in ((one, zero), (zero, one)))
        exact = Prediction(name).convert(other, x.double(), out.double(), alpha, sigma)
        error = (Prediction(name).convert(other, x, out, alpha, sigma) - exact).abs()
        assert (error <= 4 * 2.0**-24 * (p * x.abs() + q * out.abs())).all(), other.name
        if name in ("v", "flow"):
            assert (p + q).max() <= 2.5


@pytest.mark.parametrize(("schedule", "documented"), [(SCHEDULES[0], 7e-6), (SCHEDULES[2], 1e-2)], ids=["sd", "cosine"])
def test_the_documented_error_of_x0_from_eps_at_the_last_index(schedule, documented):
    end = torch.full((1,), schedule.t_max)
    alpha, sigma = schedule.alpha(end), schedule.sigma(end)
    bound = 4 * 2.0**-24 * float((1 + sigma) / alpha)
    assert 0.5 * documented < bound <= documented


def test_v_is_the_angular_velocity_of_the_variance_preserving_path():
    angle = torch.full((64,), 0.7, dtype=torch.float64)
    v = Prediction("v").target(X0, EPS, angle.cos(), angle.sin())
    step = 1e-6
    ahead, behind = (torch.cos(angle + h).view(-1, 1, 1, 1) * X0 for h in (step, -step))
    ahead, behind = (
        part + torch.sin(angle + h).view(-1, 1, 1, 1) * EPS for part, h in ((ahead, step), (behind, -step))
    )
    torch.testing.assert_close(v, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)


def test_x0_has_the_dtype_of_x():
    alpha, sigma = torch.full((64,), 0.6).double(), torch.full((64,), 0.8).double()
    for name in COEFFICIENTS:
        assert Prediction(name).to_x0(X0.float(), EPS.bfloat16(), alpha, sigma).dtype == torch.float32


def test_an_unknown_prediction_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match="'epsilon', but must be one of eps, x0, v, flow"):
        Prediction("epsilon")
