import pytest
import torch

from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.sampling.spacing import SPACINGS, leading, linspace, trailing
from tests.closed_form import SCHEDULES, schedule_name

SD = scaled_linear()


def test_trailing_strides_back_from_the_last_index():
    assert trailing(SD, 5).tolist() == [999, 799, 599, 399, 199]
    assert trailing(SD, 3).tolist() == [999, 666, 332]


def test_leading_strides_up_from_its_offset_and_misses_the_end():
    assert leading(SD, 5).tolist() == [801, 601, 401, 201, 1]
    assert leading(SD, 3, offset=0).tolist() == [666, 333, 0]


def test_linspace_holds_both_ends():
    assert linspace(SD, 4).tolist() == [999, 666, 333, 0]


def test_on_flow_trailing_and_linspace_run_from_one_towards_zero():
    for spacing in (trailing, linspace):
        torch.testing.assert_close(spacing(Flow(), 4), torch.tensor([1, 0.75, 0.5, 0.25]).double())


def test_on_flow_leading_is_the_index_over_a_thousand():
    torch.testing.assert_close(leading(Flow(), 5), leading(SD, 5) / 1000)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999])
def test_times_fall_within_the_schedule_and_are_as_many_as_asked(schedule, name, steps):
    times = SPACINGS[name](schedule, steps)
    assert len(times) == steps and times.dtype == torch.float64
    assert (times.diff() < 0).all()
    assert times.min() >= schedule.t_min and times.max() <= schedule.t_max


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_that_the_schedule_does_not_have_is_refused(name, steps):
    with pytest.raises(ValueError, match=f"steps is {steps}, but must lie between 1 and 1000"):
        SPACINGS[name](SD, steps)


def test_all_indices_can_be_walked_but_not_from_an_offset():
    assert trailing(SD, 1000).tolist() == leading(SD, 1000, offset=0).tolist() == list(range(999, -1, -1))
    with pytest.raises(ValueError, match="reaches index 1000 of 999"):
        leading(SD, 1000)
