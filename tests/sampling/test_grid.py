import math

import pytest
import torch

from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.sampling.grid import CLEAN, Grid
from tests.closed_form import states

TIMES = torch.tensor([900.0, 500.0, 100.0])


def test_a_grid_has_the_noise_levels_of_its_times_and_a_clean_end():
    schedule = scaled_linear()
    grid = Grid.of(schedule, TIMES)
    assert grid.points[-1] is CLEAN and [point.time for point in grid.points[:-1]] == TIMES.tolist()
    assert [point.sigma for point in grid.points[:-1]] == schedule.sigma(TIMES).tolist()
    log_snr = torch.tensor([point.log_snr for point in grid.points[:-1]], dtype=torch.float64)
    torch.testing.assert_close(log_snr, schedule.log_snr(TIMES))


def test_log_snr_is_infinite_at_both_ends_where_tau_is_1_and_0():
    noise, clean = Grid.of(Flow(), torch.ones(1)).points
    assert (noise.log_snr, clean.log_snr) == (-math.inf, math.inf)
    assert (noise.tau, clean.tau) == (1, 0)


@pytest.mark.parametrize("times", [TIMES.flip(0), TIMES[[0, 0]], TIMES * torch.nan])
def test_times_at_which_noise_does_not_decrease_are_refused(times):
    with pytest.raises(ValueError, match="the noise level must decrease at each step"):
        Grid.of(scaled_linear(), times)


def test_sampling_starts_from_noise_and_image_to_image_from_noisy_data():
    grid, eps, x0 = Grid.of(scaled_linear(), TIMES), states(), states().flip(0)
    first = grid.points[0]
    assert torch.equal(grid.start(eps), first.sigma * eps)
    assert torch.equal(grid.start(eps, x0), first.alpha * x0 + first.sigma * eps)


def test_image_to_image_from_pure_noise_equals_text_to_image():
    grid, eps = Grid.of(Flow(), torch.tensor([1.0, 0.5])), states()
    assert torch.equal(grid.start(eps, states().flip(0)), grid.start(eps))
