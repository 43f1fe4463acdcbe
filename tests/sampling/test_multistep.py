from functools import partial

import pytest
import torch

from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.sampling.driver import no_noise, sample
from ldm.sampling.grid import Grid
from ldm.sampling.multistep import dpmpp_2m
from ldm.sampling.one_step import ddim
from ldm.sampling.spacing import trailing
from tests.closed_form import SCHEDULES, log_snr_grid, mixture, schedule_name, states

X = states()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
def test_the_first_step_is_ddim(schedule):
    grid = Grid.of(schedule, trailing(schedule, 10))
    x, denoise = grid.start(X), mixture(schedule)
    first, expected = (next(solver(denoise, x, grid, no_noise)).x for solver in (dpmpp_2m, ddim))
    torch.testing.assert_close(first, expected)


def test_the_step_after_pure_noise_is_ddim_too():
    grid = Grid.of(Flow(), trailing(Flow(), 10))
    walks = zip(*(s(mixture(Flow()), grid.start(X), grid, no_noise) for s in (dpmpp_2m, ddim)), strict=True)
    equal = [torch.allclose(ours.x, first.x, rtol=1e-12) for ours, first in walks]
    assert equal[:3] == [True, True, False]


def test_x0_that_is_a_line_in_log_snr_is_followed_by_the_second_order_formula():
    """For x0 = c·lambda, with lambda half the log-SNR, the data term of the exact solution is an integral of
    c·lambda·e^lambda; the second order is exact for it up to the third power of the step."""
    schedule = scaled_linear()

    def denoise(x, t):
        return torch.full_like(x, float(schedule.log_snr(torch.tensor(t).double())) / 2)

    def error(steps):
        grid = log_snr_grid(schedule, steps)
        (t, *_, s) = grid.points
        a, b = t.log_snr / 2, s.log_snr / 2
        integral = (b - 1) - (a - 1) * torch.exp(torch.tensor(a - b).double())
        exact = s.sigma / t.sigma * X + s.alpha * integral
        return float((sample(partial(dpmpp_2m, lower_order_final=False), denoise, X, grid) - exact).abs().max())

    assert error(64) / error(128) == pytest.approx(4, rel=0.1)


def test_the_last_step_is_of_first_order_unless_told_otherwise():
    schedule = scaled_linear()
    grid, denoise = log_snr_grid(schedule, 6), mixture(schedule)
    *_, before, last = dpmpp_2m(denoise, X, grid, no_noise)
    tail = Grid(grid.points[-2:])
    torch.testing.assert_close(last.x, next(ddim(denoise, before.x, tail, no_noise)).x)
    *_, second_order = dpmpp_2m(denoise, X, grid, no_noise, lower_order_final=False)
    assert not torch.allclose(second_order.x, last.x, rtol=1e-3)


def test_to_the_clean_end_the_last_step_is_the_denoiser_s_answer_in_any_case():
    schedule = scaled_linear()
    grid = Grid.of(schedule, trailing(schedule, 5))
    *_, last = dpmpp_2m(mixture(schedule), grid.start(X), grid, no_noise, lower_order_final=False)
    torch.testing.assert_close(last.x, last.x0)
