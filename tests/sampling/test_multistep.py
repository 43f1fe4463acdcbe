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


def test_the_step_after_the_one_from_pure_noise_is_ddim_too():
    grid = Grid.of(Flow(), trailing(Flow(), 10))
    pairs = zip(*(s(mixture(Flow()), grid.start(X), grid, no_noise) for s in (dpmpp_2m, ddim)), strict=True)
    equal = [torch.allclose(ours.x, first.x, rtol=1e-12) for ours, first in pairs]
    assert equal[:3] == [True, True, False]


def test_dpmpp_2m_integrates_x0_linear_in_log_snr_to_second_order():
    """For x0 = lambda, half the log-SNR, the data term of the exact solution is the integral of lambda·e^lambda,
    for which the local error of a second-order step is of third order."""
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


def test_the_last_step_is_of_first_order_by_default():
    schedule = scaled_linear()
    grid, denoise = log_snr_grid(schedule, 6), mixture(schedule)
    *_, before, last = dpmpp_2m(denoise, X, grid, no_noise)
    tail = Grid(grid.points[-2:], schedule)
    torch.testing.assert_close(last.x, next(ddim(denoise, before.x, tail, no_noise)).x)
    *_, second_order = dpmpp_2m(denoise, X, grid, no_noise, lower_order_final=False)
    assert not torch.allclose(second_order.x, last.x, rtol=1e-3)


def test_the_step_to_the_clean_end_returns_the_denoiser_s_estimate():
    schedule = scaled_linear()
    grid = Grid.of(schedule, trailing(schedule, 5))
    *_, last = dpmpp_2m(mixture(schedule), grid.start(X), grid, no_noise, lower_order_final=False)
    torch.testing.assert_close(last.x, last.x0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
@pytest.mark.parametrize(
    ("solver", "other"),
    [
        (partial(dpmpp_2m_sde, eta=0.0), dpmpp_2m),
        (partial(dpmpp_3m_sde, eta=0.0), partial(dpmpp_3m, curvature="half")),
        (partial(unipc, order=1, corrector=False), ddim),
        (partial(unipc, order=2, corrector=False), dpmpp_2m),
        (partial(unipc, order=3, corrector=False), dpmpp_3m),
    ],
)
def test_equivalent_solvers_give_the_same_samples(schedule, solver, other):
    """With 10 steps 2M and 3M lower their order towards the end, as UniPC always does. With two points UniPC uses
    bh2, which is the midpoint rule, whereas 3M uses the exact one by default."""
    grid, denoise = Grid.of(schedule, trailing(schedule, 10)), mixture(schedule)
    if other is dpmpp_3m and solver.func is unipc:
        other = partial(dpmpp_3m, rule="midpoint")
    x = grid.start(X)
    torch.testing.assert_close(sample(solver, denoise, x, grid), sample(other, denoise, x, grid))


def test_the_corrector_improves_a_step_by_the_estimate_at_its_end():
    """For x0 linear in log-SNR, the first step, of first order, is inexact; corrected by the second call, its error
    is of third order in the step."""
    schedule = scaled_linear()

    def denoise(x, t):
        return torch.full_like(x, float(schedule.log_snr(torch.tensor(t).double())) / 2)

    def error(steps, corrector):
        grid = log_snr_grid(schedule, steps)
        t, s, r = grid.points[:3]
        steps_of_unipc = unipc(denoise, X, Grid((t, s, r), schedule), no_noise, 1, "bh2", corrector, False)
        next(steps_of_unipc)
        end = next(steps_of_unipc).x
        a, b = t.log_snr / 2, s.log_snr / 2
        exact = s.sigma / t.sigma * X + s.alpha * ((b - 1) - (a - 1) * torch.exp(torch.tensor(a - b).double()))
        after = r.sigma / s.sigma * exact + (r.alpha - r.sigma / s.sigma * s.alpha) * b
        return float((end - after).abs().max())

    assert error(20, corrector=True) < 0.05 * error(20, corrector=False)
    assert error(20, corrector=True) / error(40, corrector=True) > 6


@pytest.mark.parametrize("solver", [dpmpp_2m_sde, dpmpp_3m_sde])
def test_stochastic_solvers_keep_the_marginals_of_data_at_one_point(solver):
    """For data at a single point m, x_s is alpha_s·m + sigma_s·eps, whose mean and variance are checked at the end."""
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
