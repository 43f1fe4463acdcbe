import json

import pytest
import torch

from ldm.diffusion.schedule import Flow, cosine, from_config, linear, scaled_linear
from tests.closed_form import SCHEDULES, schedule_name

DISCRETE = [scaled_linear(), linear(), cosine()]


def inner_times(schedule):
    share = torch.linspace(0.001, 0.999, 777, dtype=torch.float64)
    return schedule.t_min + share * (schedule.t_max - schedule.t_min)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
def test_log_snr_is_that_of_alpha_and_sigma(schedule):
    t = inner_times(schedule)
    expected = 2 * (schedule.alpha(t) / schedule.sigma(t)).log()
    torch.testing.assert_close(schedule.log_snr(t), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
def test_time_is_the_inverse_of_log_snr(schedule):
    t = inner_times(schedule)
    torch.testing.assert_close(schedule.time(schedule.log_snr(t)), t, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
def test_noise_only_grows_with_time(schedule):
    assert (schedule.log_snr(inner_times(schedule)).diff() < 0).all()


@pytest.mark.parametrize("schedule", DISCRETE, ids=schedule_name)
def test_the_ends_of_a_table_are_reached_in_both_directions(schedule):
    ends = torch.tensor([0.0, 999.0])
    torch.testing.assert_close(schedule.time(schedule.log_snr(ends)), ends.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", DISCRETE, ids=schedule_name)
def test_discrete_schedules_preserve_variance(schedule):
    t = inner_times(schedule)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", DISCRETE, ids=schedule_name)
def test_between_two_entries_log_snr_is_a_line(schedule):
    left, middle, right = (schedule.log_snr(torch.tensor([500 + f])) for f in (0.0, 0.25, 1.0))
    torch.testing.assert_close(middle, 0.75 * left + 0.25 * right)


def test_scaled_linear_is_the_product_of_its_betas():
    beta = 1.0
    schedule = scaled_linear()
    for i in range(1000):
        beta *= 1 - (0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
    assert float(schedule.alpha(torch.tensor(999.0))) == pytest.approx(beta**0.5, rel=1e-10)


def test_cosine_follows_its_formula_until_beta_is_clipped():
    t = torch.arange(0, 990, dtype=torch.float64)
    angle = ((t + 1) / 1000 + 0.008) / 1.008 * torch.pi / 2
    expected = angle.cos() / torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64).cos()
    torch.testing.assert_close(cosine().alpha(t), expected, rtol=1e-9, atol=0)


def test_flow_is_a_straight_line_with_exact_ends():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert torch.equal(Flow().sigma(t), t) and torch.equal(Flow().alpha(t), 1 - t)
    assert Flow().log_snr(t)[0] == torch.inf and Flow().log_snr(t)[-1] == -torch.inf
    assert torch.equal(Flow(shift=3.0).alpha(t[-1:]), torch.zeros(1, dtype=torch.float64))


def test_a_shift_multiplies_sigma_over_alpha():
    t = inner_times(Flow())
    ratio = Flow(shift=3.0).sigma(t) / Flow(shift=3.0).alpha(t)
    torch.testing.assert_close(ratio, 3 * t / (1 - t))


def test_a_shift_must_be_positive():
    with pytest.raises(ValueError, match="shift is 0"):
        Flow(shift=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
def test_coefficients_are_float64_for_times_of_any_type(schedule):
    t = torch.tensor([0.5])
    assert {f(t).dtype for f in (schedule.alpha, schedule.sigma, schedule.log_snr, schedule.time)} == {torch.float64}


@pytest.mark.parametrize("schedule", [*DISCRETE, linear(steps=10), cosine(offset=0.1), Flow(), Flow(shift=3.0)])
def test_a_schedule_is_made_again_from_its_config(schedule):
    t = inner_times(schedule)
    again = from_config(json.loads(json.dumps(schedule.config)))
    assert again.name == schedule.name and torch.equal(again.log_snr(t), schedule.log_snr(t))


@pytest.mark.parametrize(
    "config", [{}, {"name": "x"}, {"name": "flow", "_target_": "os.system"}, {"name": "flow", "shift": 0}]
)
def test_a_config_of_no_schedule_is_refused(config):
    with pytest.raises(ValueError, match="schedule"):
        from_config(config)
