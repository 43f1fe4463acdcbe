import json

import pytest
import torch

from ldm.diffusion.schedule import (
    EDM,
    Discrete,
    Flow,
    check_config,
    cosine,
    flow_at_resolution,
    from_config,
    linear,
    resolution_shift,
    scaled_linear,
    sigmoid,
    snr_shift,
    zero_terminal_snr,
)
from tests.closed_form import EVERY_SCHEDULE, schedule_name

DISCRETE = [scaled_linear(), linear(), cosine(), sigmoid()]
PRESERVING = [schedule for schedule in EVERY_SCHEDULE if "flow" not in schedule_name(schedule)]
PURE = [schedule for schedule in EVERY_SCHEDULE if float(schedule.alpha(torch.tensor([schedule.t_max]))) == 0]


def inner_times(schedule):
    fraction = torch.linspace(0.001, 0.999, 777, dtype=torch.float64)
    return schedule.t_min + fraction * (schedule.t_max - schedule.t_min)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
def test_log_snr_agrees_with_alpha_and_sigma(schedule):
    t = inner_times(schedule)
    expected = 2 * (schedule.alpha(t) / schedule.sigma(t)).log()
    torch.testing.assert_close(schedule.log_snr(t), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
def test_time_is_the_inverse_of_log_snr(schedule):
    t = inner_times(schedule)
    torch.testing.assert_close(schedule.time(schedule.log_snr(t)), t, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
def test_log_snr_decreases_with_time(schedule):
    assert (schedule.log_snr(inner_times(schedule)).diff() < 0).all()


@pytest.mark.parametrize("schedule", DISCRETE, ids=schedule_name)
def test_time_inverts_log_snr_at_both_ends_of_a_table(schedule):
    ends = torch.tensor([0.0, 999.0])
    torch.testing.assert_close(schedule.time(schedule.log_snr(ends)), ends.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", PRESERVING, ids=schedule_name)
def test_every_schedule_but_flow_preserves_variance(schedule):
    t = inner_times(schedule)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", DISCRETE, ids=schedule_name)
def test_log_snr_is_linear_between_two_entries(schedule):
    left, middle, right = (schedule.log_snr(torch.tensor([500 + f])) for f in (0.0, 0.25, 1.0))
    torch.testing.assert_close(middle, 0.75 * left + 0.25 * right)


def test_alpha_bar_of_scaled_linear_is_the_product_of_1_minus_beta():
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


def test_flow_is_linear_with_exact_ends():
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


def test_sigmoid_follows_its_formula_and_is_symmetric_about_the_middle():
    t = torch.arange(0, 999, dtype=torch.float64)
    low, high = (torch.tensor(v, dtype=torch.float64).sigmoid() for v in (-6.0, 6.0))
    expected = (high - (12 * (t + 1) / 1000 - 6).sigmoid()) / (high - low)
    torch.testing.assert_close(sigmoid(tau=0.5).alpha(t).square(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sigmoid().log_snr(t), -sigmoid().log_snr(998 - t), rtol=1e-8, atol=1e-8)


def test_edm_spaces_sigma_over_alpha_geometrically():
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    ratio = EDM().sigma(t) / EDM().alpha(t)
    torch.testing.assert_close(ratio, torch.logspace(-2.69897000433602, 1.90308998699194, 7, dtype=torch.float64))


@pytest.mark.parametrize("schedule", PURE, ids=schedule_name)
def test_the_pure_noise_end_is_exact_in_every_function(schedule):
    end = torch.tensor([schedule.t_max] * 9)  # nine: vectorised kernels may round the remainder differently
    assert (
        schedule.alpha(end).eq(0).all()
        and schedule.sigma(end).eq(1).all()
        and schedule.log_snr(end).eq(-torch.inf).all()
    )
    assert schedule.time(torch.full((9,), -torch.inf)).eq(schedule.t_max).all()


@pytest.mark.parametrize("schedule", DISCRETE, ids=schedule_name)
def test_zero_terminal_snr_follows_the_algorithm_of_the_paper(schedule):
    t = torch.arange(1000, dtype=torch.float64)
    roots = schedule.alpha(t)
    expected = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    rescaled = zero_terminal_snr(schedule)
    torch.testing.assert_close(rescaled.alpha(t), expected, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(rescaled.log_snr(t[:1]), schedule.log_snr(t[:1]), rtol=1e-9, atol=0)


def test_zero_terminal_snr_of_a_continuous_schedule_and_of_one_that_has_it():
    ends = torch.tensor([0.0, 1.0])
    assert zero_terminal_snr(EDM()).alpha(ends).tolist() == [pytest.approx(float(EDM().alpha(ends[:1]))), 0]
    for schedule in (Flow(), zero_terminal_snr(linear()), snr_shift(Flow(), 2.0)):
        assert zero_terminal_snr(schedule) is schedule


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
def test_snr_shift_multiplies_sigma_over_alpha_on_the_same_path(schedule):
    t, shifted = inner_times(schedule), snr_shift(schedule, 3.0)
    ratio = 3 * schedule.sigma(t) / schedule.alpha(t)
    torch.testing.assert_close(shifted.sigma(t) / shifted.alpha(t), ratio, rtol=1e-9, atol=0)
    power = 1 if "flow" in schedule_name(schedule) else 2
    torch.testing.assert_close(shifted.sigma(t) ** power + shifted.alpha(t) ** power, torch.ones_like(t))


def test_the_shift_of_flow_is_an_snr_shift():
    t = torch.linspace(0, 1, 99, dtype=torch.float64)
    for shift in (0.3, 3.0):
        torch.testing.assert_close(snr_shift(Flow(), shift).sigma(t), Flow(shift).sigma(t), rtol=1e-14, atol=0)
        torch.testing.assert_close(snr_shift(Flow(), shift).alpha(t), Flow(shift).alpha(t), rtol=1e-12, atol=0)


def test_the_inverse_shift_undoes_a_shift():
    schedule, t = cosine(), inner_times(cosine())
    torch.testing.assert_close(snr_shift(snr_shift(schedule, 4.0), 0.25).alpha(t), schedule.alpha(t))


def test_the_resolution_shift_keeps_the_uncertainty_of_a_constant_image():
    """The estimate of c from m pixels alpha·c + sigma·eps, mean / alpha, has std sigma / (alpha·sqrt(m))."""
    t, positions, trained = torch.tensor([0.2, 0.7]), 128 * 128, 64 * 64
    large, small = flow_at_resolution(positions, trained), Flow()
    errors = [schedule.sigma(t) / schedule.alpha(t) / n**0.5 for schedule, n in ((large, positions), (small, trained))]
    torch.testing.assert_close(*errors)
    assert resolution_shift(positions, trained) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: snr_shift(Flow(), 0.0), "shift of snr_shift is 0"),
        (lambda: snr_shift(Flow(), torch.inf), "must be positive"),
        (lambda: EDM(80.0, 0.002), "0 < sigma_min < sigma_max"),
        (lambda: EDM(0.0, 80.0), "0 < sigma_min < sigma_max"),
        (lambda: sigmoid(start=3.0, end=-3.0), "start < end"),
        (lambda: sigmoid(tau=0.0), "tau > 0"),
        (lambda: flow_at_resolution(0, 64), "must be 1 or more"),
        (lambda: Flow(torch.nan), "shift is nan"),
        (lambda: Flow(torch.inf), "shift is inf"),
        (lambda: linear(steps=1), "at least 2 betas"),
        (lambda: linear(beta_start=-1e-4), "each above 0"),
        (lambda: linear(beta_end=torch.nan), "each above 0"),
        (lambda: scaled_linear(beta_end=2.0), "each above 0 and below 1, but .*'beta_end': 2.0"),
        (lambda: cosine(beta_max=1.0), "the cosine schedule needs"),
        (lambda: sigmoid(least=0.0), "the sigmoid schedule needs"),
    ],
)
def test_invalid_schedule_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
def test_coefficients_are_float64_for_times_of_any_dtype(schedule):
    t = torch.tensor([0.5])
    assert {f(t).dtype for f in (schedule.alpha, schedule.sigma, schedule.log_snr, schedule.time)} == {torch.float64}


@pytest.mark.parametrize(
    "schedule", [*EVERY_SCHEDULE, linear(steps=10), cosine(offset=0.1), sigmoid(tau=0.5), EDM(0.1, 9)]
)
def test_a_schedule_can_be_rebuilt_from_its_config(schedule):
    t = inner_times(schedule)
    rebuilt = from_config(json.loads(json.dumps(schedule.config)))
    assert rebuilt.name == schedule.name and torch.equal(rebuilt.log_snr(t), schedule.log_snr(t))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"name": "x"},
        {"name": ["flow"]},
        {"name": "linear", "steps": -3},
        {"name": "scaled_linear", "beta_start": -1.0},
        {"name": "flow", "_target_": "os.system"},
        {"name": "flow", "shift": 0},
        {"name": "snr_shift", "shift": 2.0},
        {"name": "snr_shift", "shift": 2.0, "schedule": "flow"},
        {"name": "zero_terminal_snr", "schedule": {"name": "x"}},
        {"name": "table"},
        {"name": "table", "betas": 0.1},
        {"name": "table", "betas": "0.1"},
        {"name": "table", "betas": [[0.1, 0.2]]},
        {"name": "table", "betas": [0.1, 1.5]},
        {"name": "table", "betas": [0.1, float("nan")]},
        {"name": "table", "betas": [0.1] * 100_001},
    ],
)
def test_an_invalid_schedule_config_is_refused(config):
    with pytest.raises(ValueError, match="schedule"):
        from_config(config)


class Gentle(Flow):
    """A schedule of one's own whose config is that of another."""

    name = "gentle"

    def sigma(self, t):
        return super().sigma(t).square()

    def alpha(self, t):
        return 1 - self.sigma(t)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
def test_a_model_may_be_trained_with_each_schedule(schedule):
    check_config(schedule)


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (Discrete("mine", torch.full((1000,), 0.01)), "the schedule is 'mine', but must be one of"),
        (zero_terminal_snr(Discrete("mine", torch.full((1000,), 0.01))), "the schedule is 'mine'"),
        (Discrete("linear", torch.full((1000,), 0.01)), "this builds another schedule"),
        (Gentle(), "this builds another schedule"),
    ],
)
def test_a_schedule_that_a_saved_model_could_not_rebuild_is_refused(schedule, reason):
    with pytest.raises(ValueError, match=f"could not be loaded.*{reason}.*table"):
        check_config(schedule)


@pytest.mark.parametrize("steps", [0, -1, 10**12, 1.5, "1000", None, True])
def test_a_table_of_an_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match="must have an integer from 1 to 100000"):
        from_config({"name": "linear", "steps": steps})


@pytest.mark.parametrize("shift", [10**400, float("nan"), float("inf"), -(10**400)])
def test_a_number_beyond_floats_is_refused(shift):
    with pytest.raises(ValueError, match="the shift of the schedule 'flow' must be a number"):
        from_config({"name": "flow", "shift": shift})
