import pytest
import torch

from ldm.diffusion.schedule import EDM, Flow, scaled_linear, zero_terminal_snr
from ldm.sampling.spacing import SPACINGS, custom, get_spacing, karras, leading, linspace, log_snr, trailing
from tests.closed_form import SCHEDULES, schedule_name

SD = scaled_linear()
COUNTED = [name for name in SPACINGS if name != "custom"]


def test_trailing_strides_down_from_the_last_index():
    assert trailing(SD, 5).tolist() == [999, 799, 599, 399, 199]
    assert trailing(SD, 3).tolist() == [999, 666, 332]


def test_leading_strides_up_from_its_offset_and_leaves_out_the_end():
    assert leading(SD, 5).tolist() == [801, 601, 401, 201, 1]
    assert leading(SD, 3, offset=0).tolist() == [666, 333, 0]


def test_linspace_includes_both_ends():
    assert linspace(SD, 4).tolist() == [999, 666, 333, 0]


def test_on_flow_trailing_and_linspace_start_at_one_and_leave_out_zero():
    for spacing in (trailing, linspace):
        torch.testing.assert_close(spacing(Flow(), 4), torch.tensor([1, 0.75, 0.5, 0.25]).double())


def test_on_flow_leading_is_the_discrete_index_over_1000():
    torch.testing.assert_close(leading(Flow(), 5), leading(SD, 5) / 1000)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999])
def test_times_decrease_within_the_schedule_and_have_the_given_number(schedule, name, steps):
    times = SPACINGS[name](schedule, steps)
    assert len(times) == steps and times.dtype == torch.float64
    assert (times.diff() < 0).all()
    assert times.min() >= schedule.t_min and times.max() <= schedule.t_max


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, float("nan"), True, "20"])
def test_an_invalid_number_of_steps_is_refused(name, steps):
    with pytest.raises(ValueError, match=f"steps is {steps!r}, but must be a whole number between 1 and 1000"):
        SPACINGS[name](SD, steps)


def test_all_1000_indices_can_be_used_without_an_offset_only():
    assert trailing(SD, 1000).tolist() == leading(SD, 1000, offset=0).tolist() == list(range(999, -1, -1))
    with pytest.raises(ValueError, match="reaches index 1000 of 999"):
        leading(SD, 1000)


def ratios(schedule, times):
    """sigma / alpha at the times."""
    return schedule.sigma(times) / schedule.alpha(times)


def test_karras_takes_equal_steps_in_a_root_of_sigma_over_alpha():
    for rho in (1.0, 7.0):
        roots = ratios(SD, karras(SD, 9, rho=rho)) ** (1 / rho)
        torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(8))
    torch.testing.assert_close(karras(SD, 9)[[0, -1]], torch.tensor([999.0, 0.0]).double())


@pytest.mark.parametrize("schedule", [SD, EDM()], ids=schedule_name)
def test_log_snr_and_its_alias_exponential_take_equal_steps_in_log_snr(schedule):
    times = log_snr(schedule, 9)
    steps = schedule.log_snr(times).diff()
    torch.testing.assert_close(steps, steps.mean().expand(8))
    assert SPACINGS["exponential"] is SPACINGS["log_snr"]


@pytest.mark.parametrize("schedule", [Flow(), Flow(3.0), zero_terminal_snr(SD)])
@pytest.mark.parametrize("spacing", [karras, log_snr])
def test_a_schedule_of_pure_noise_starts_there_and_continues_at_ratio_80(schedule, spacing):
    first, *others = ratios(schedule, spacing(schedule, 6)).tolist()
    assert first == float("inf") and len(others) == 5
    assert others[0] == pytest.approx(80)


def test_sigma_min_and_sigma_max_bound_sigma_over_alpha():
    torch.testing.assert_close(
        ratios(Flow(), karras(Flow(), 4, sigma_min=0.1, sigma_max=10.0))[[0, -1]], torch.tensor([10, 0.1]).double()
    )


def test_linspace_on_edm_includes_both_ends_since_neither_is_clean():
    assert linspace(EDM(), 3).tolist() == [1, 0.5, 0]


def test_custom_accepts_times_or_values_of_sigma_over_alpha():
    assert custom(SD, 3, times=[900, 400.5, 10]).tolist() == [900, 400.5, 10]
    sigmas = [10.0, 3.0, 0.5]
    torch.testing.assert_close(ratios(SD, custom(SD, 3, sigmas=sigmas)), torch.tensor(sigmas).double())
    assert torch.equal(custom(SD, 3, sigmas=[*sigmas, 0.0]), custom(SD, 3, sigmas=sigmas))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("custom", {}, "needs either a list of times or a list of sigmas"),
        ("custom", {"times": [900, 1], "sigmas": [9, 1]}, "needs either a list of times or a list of sigmas"),
        (
            "custom",
            {"sigmas": [1.0, 2.0]},
            r"the sigmas of spacing=custom must be decreasing .* \[1.0, 2.0\]",
        ),
        ("custom", {"times": [5, 5]}, "decreasing numbers"),
        ("custom", {"times": 5}, "decreasing numbers, but are 5"),
        ("custom", {"times": "ab"}, "decreasing numbers, but are ab"),
        ("custom", {"sigmas": [None, 1]}, "decreasing numbers"),
        ("custom", {"sigmas": [float("inf"), 1]}, "decreasing numbers"),
        ("custom", {"sigmas": [2, -1]}, r"are \[2, -1\]: list them from the noisiest to the cleanest, none below 0"),
        ("leading", {"offset": -1}, "offset of spacing=leading is -1, but must be a whole number of at least 0"),
        ("leading", {"extra": "no"}, "spacing=leading's option extra is 'no', but must be true or false"),
        ("custom", {"times": [float("nan"), 5]}, "decreasing numbers"),
        ("custom", {"times": []}, "decreasing numbers"),
        ("custom", {"times": [3, 2, 1]}, "lists 3 times, but steps is 2: set steps=3"),
        ("custom", {"times": [1500, 2]}, "times from 2 to 1500, but schedule=scaled_linear has times from 0 to 999"),
        ("karras", {"sigma_max": 1000.0}, "schedule=scaled_linear has times from 0 to 999"),
        ("karras", {"rho": 0.0}, "rho of spacing=karras is 0.0, but must be a positive number"),
        ("karras", {"rho": 0.001}, "times from nan to nan"),
        ("karras", {"sigma_min": "low"}, "0 < sigma_min < sigma_max, not low and"),
        ("log_snr", {"sigma_min": 3.0, "sigma_max": 2.0}, "0 < sigma_min < sigma_max, not 3.0 and 2.0"),
        ("trailing", {"rho": 7}, "spacing=trailing has no option 'rho'; its options are: none"),
        ("trialing", {}, "spacing is 'trialing', but must be one of trailing, leading"),
    ],
)
def test_unknown_spacings_and_invalid_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_spacing(name, options)(SD, 2)
