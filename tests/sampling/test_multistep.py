from functools import partial

import pytest
import torch

from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.sampling.driver import no_noise, sample
from ldm.sampling.grid import Grid
from ldm.sampling.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, unipc
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
    tail = Grid(grid.points[-2:], schedule)
    torch.testing.assert_close(last.x, next(ddim(denoise, before.x, tail, no_noise)).x)
    *_, second_order = dpmpp_2m(denoise, X, grid, no_noise, lower_order_final=False)
    assert not torch.allclose(second_order.x, last.x, rtol=1e-3)


def test_to_the_clean_end_the_last_step_is_the_denoiser_s_answer_in_any_case():
    schedule = scaled_linear()
    grid = Grid.of(schedule, trailing(schedule, 5))
    *_, last = dpmpp_2m(mixture(schedule), grid.start(X), grid, no_noise, lower_order_final=False)
    torch.testing.assert_close(last.x, last.x0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
@pytest.mark.parametrize(
    ("solver", "other"),
    [
        (partial(dpmpp_2m_sde, eta=0.0), dpmpp_2m),
        (partial(dpmpp_3m_sde, eta=0.0), dpmpp_3m),
        (partial(unipc, order=1, corrector=False), ddim),
        (partial(unipc, order=2, corrector=False), dpmpp_2m),
        (partial(unipc, order=3, corrector=False), dpmpp_3m),
    ],
)
def test_solvers_of_two_names_that_are_the_same(schedule, solver, other):
    """At 10 steps, where 2M and 3M lower their order towards the end as UniPC always does. Of two points UniPC's
    bh2 makes the midpoint rule, and 3M at its second step the exact one: the steps up to there may differ."""
    grid, denoise = Grid.of(schedule, trailing(schedule, 10)), mixture(schedule)
    if other is dpmpp_3m and solver.func is unipc:
        other = partial(dpmpp_3m, rule="midpoint")
    x = grid.start(X)
    torch.testing.assert_close(sample(solver, denoise, x, grid), sample(other, denoise, x, grid))


def test_the_corrector_mends_a_step_by_what_is_said_at_its_end():
    """x0 that is a line in log-SNR: the first step, of first order, misses; corrected by the second call, the
    exact integral of the line is met up to the third power of the step."""
    schedule = scaled_linear()

    def denoise(x, t):
        return torch.full_like(x, float(schedule.log_snr(torch.tensor(t).double())) / 2)

    def misses(steps, corrector):
        grid = log_snr_grid(schedule, steps)
        t, s, r = grid.points[:3]
        walk = unipc(denoise, X, Grid((t, s, r), schedule), no_noise, 1, "bh2", corrector, False)
        next(walk)
        end = next(walk).x
        a, b = t.log_snr / 2, s.log_snr / 2
        exact = s.sigma / t.sigma * X + s.alpha * ((b - 1) - (a - 1) * torch.exp(torch.tensor(a - b).double()))
        after = r.sigma / s.sigma * exact + (r.alpha - r.sigma / s.sigma * s.alpha) * b
        return float((end - after).abs().max())

    assert misses(20, corrector=True) < 0.05 * misses(20, corrector=False)
    assert misses(20, corrector=True) / misses(40, corrector=True) > 6


@pytest.mark.parametrize("solver", [dpmpp_2m_sde, dpmpp_3m_sde])
def test_with_noise_the_marginals_of_a_known_point_are_kept(solver):
    """With data at one point m, x_s is alpha_s·m + sigma_s·eps again: its mean and variance at the end."""
    schedule, m = scaled_linear(), 0.7
    grid = log_snr_grid(schedule, 6)
    first, last = grid.points[0], grid.points[-1]
    x = torch.full((8, 1), first.alpha * m, dtype=torch.float64)
    x[1] += first.sigma

    def noise(draw):
        return torch.zeros_like(x).index_fill_(0, torch.tensor(2 + draw), 1.0)

    end = sample(solver, lambda x, t: torch.full_like(x, m), x, grid, noise).flatten()
    assert float(end[0]) == pytest.approx(last.alpha * m)
    assert float((end[1:] - end[0]).norm()) == pytest.approx(last.sigma)
