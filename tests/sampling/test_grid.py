import math

import pytest
import torch

from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.sampling.grid import CLEAN, Grid
from tests.closed_form import states

TIMES = torch.tensor([900.0, 500.0, 100.0])


def test_a_grid_holds_the_schedule_at_its_times_and_ends_clean():
    schedule = scaled_linear()
    grid = Grid.of(schedule, TIMES)
    assert grid.points[-1] is CLEAN and [point.time for point in grid.points[:-1]] == TIMES.tolist()
    assert [point.sigma for point in grid.points[:-1]] == schedule.sigma(TIMES).tolist()
    log_snr = torch.tensor([point.log_snr for point in grid.points[:-1]], dtype=torch.float64)
    torch.testing.assert_close(log_snr, schedule.log_snr(TIMES))


def test_pure_noise_and_the_clean_end_are_infinitely_far_in_log_snr_but_not_in_tau():
    noise, clean = Grid.of(Flow(), torch.ones(1)).points
    assert (noise.log_snr, clean.log_snr) == (-math.inf, math.inf)
    assert (noise.tau, clean.tau) == (1, 0)


@pytest.mark.parametrize("times", [TIMES.flip(0), TIMES[[0, 0]], TIMES * torch.nan])
def test_times_along_which_the_noise_does_not_fall_are_refused(times):
    with pytest.raises(ValueError, match="noise must fall at each step"):
        Grid.of(scaled_linear(), times)


def test_sampling_starts_from_sigma_times_noise_and_image_to_image_from_noised_data():
    grid, eps, x0 = Grid.of(scaled_linear(), TIMES), states(), states().flip(0)
    first = grid.points[0]
    assert torch.equal(grid.start(eps), first.sigma * eps)
    assert torch.equal(grid.start(eps, x0), first.alpha * x0 + first.sigma * eps)


def test_from_pure_noise_image_to_image_is_text_to_image():
    grid, eps = Grid.of(Flow(), torch.tensor([1.0, 0.5])), states()
    assert torch.equal(grid.start(eps, states().flip(0)), grid.start(eps))
