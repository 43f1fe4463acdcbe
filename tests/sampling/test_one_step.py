from functools import partial
from itertools import pairwise

import pytest
import torch

from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.random import normal
from ldm.sampling.driver import SAMPLERS, sample
from ldm.sampling.grid import Grid
from ldm.sampling.one_step import ddim, ddpm, dpmpp_2s, dpmpp_sde, edm, euler, euler_a, heun
from ldm.sampling.spacing import trailing
from tests.closed_form import SCHEDULES, gaussian, log_snr_grid, mixture, schedule_name, states

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
X = states()


def noise(step):
    return normal(0, "sample", torch.arange(len(X)), step, X.shape[1:]).double()


def setup(schedule, steps=10):
    """Returns a grid from the last time to the clean end, a state at its first point, and a denoiser."""
    grid = Grid.of(schedule, trailing(schedule, steps))
    return grid, grid.start(X), mixture(schedule)


@every_schedule
def test_ddim_is_euler(schedule):
    grid, x, denoise = setup(schedule)
    torch.testing.assert_close(sample(ddim, denoise, x, grid), sample(euler, denoise, x, grid))


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=schedule_name)
def test_euler_is_euler_on_x_over_alpha_against_sigma_over_alpha(schedule):
    grid, x, denoise = setup(schedule)
    scaled = x / grid.points[0].alpha
    for t, s in pairwise(grid.points):
        eps = (t.alpha * scaled - t.alpha * denoise(t.alpha * scaled, t.time)) / t.sigma
        scaled = scaled + (s.sigma / s.alpha - t.sigma / t.alpha) * eps
    torch.testing.assert_close(sample(euler, denoise, x, grid), scaled, rtol=1e-8, atol=1e-8)


def test_on_flow_euler_follows_the_velocity_in_t():
    grid, x, denoise = setup(Flow())
    expected = x
    for t, s in pairwise(grid.points):
        velocity = (expected - denoise(expected, t.time)) / t.sigma  # eps - x0
        expected = expected + (s.sigma - t.sigma) * velocity
    torch.testing.assert_close(sample(euler, denoise, x, grid), expected)


def test_on_other_schedules_euler_is_not_euler_in_time():
    schedule, h = scaled_linear(), 1e-3
    denoise = mixture(schedule)
    grid = Grid.of(schedule, torch.tensor([500.0, 500 - h, 100.0]).double(), clean=False)
    t, ahead, s = grid.points
    x0 = denoise(X, t.time)
    eps = (X - t.alpha * x0) / t.sigma
    velocity = ((t.alpha - ahead.alpha) * x0 + (t.sigma - ahead.sigma) * eps) / h
    step, tiny = (next(euler(denoise, X, Grid((t, end), schedule), noise)).x for end in (s, ahead))
    assert (step - (X + (s.time - t.time) * velocity)).abs().mean() > 0.01
    torch.testing.assert_close(tiny, X - h * velocity)  # both follow the same ODE


@every_schedule
def test_ddim_with_eta_one_is_ddpm_with_the_same_noise(schedule):
    grid, x, denoise = setup(schedule)
    torch.testing.assert_close(
        sample(partial(ddim, eta=1.0), denoise, x, grid, noise), sample(ddpm, denoise, x, grid, noise)
    )


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=schedule_name)
def test_ddpm_adds_noise_of_the_posterior_variance(schedule):
    grid, x, denoise = setup(schedule)
    t, s = grid.points[:2]
    with_noise = next(ddpm(denoise, x, grid, noise)).x
    without = next(ddpm(denoise, x, grid, lambda step: torch.zeros_like(x))).x
    variance = s.sigma**2 / t.sigma**2 * (1 - t.alpha**2 / s.alpha**2)
    torch.testing.assert_close(with_noise - without, variance**0.5 * noise(0))


@every_schedule
def test_ddpm_keeps_the_marginals_of_data_at_one_point(schedule):
    """For data at a single point m, x_s is alpha_s·m + sigma_s·eps, with mean and variance checked at each step."""
    grid, m = Grid.of(schedule, trailing(schedule, 6)), 0.7
    mean, variance = grid.points[0].alpha * m, grid.points[0].sigma ** 2

    def step(points, x, z):
        x, z = torch.tensor([x]).double(), torch.tensor([z]).double()
        return float(next(ddpm(lambda x, t: torch.full_like(x, m), x, Grid(points, schedule), lambda _: z)).x)

    for t, s in pairwise(grid.points[:-1]):
        shift = step((t, s), 0.0, 0.0)
        gain, std = step((t, s), 1.0, 0.0) - shift, step((t, s), 0.0, 1.0) - shift
        mean, variance = shift + gain * mean, gain**2 * variance + std**2
        assert mean == pytest.approx(s.alpha * m) and variance == pytest.approx(s.sigma**2)


@every_schedule
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_every_sampler_reaches_data_at_one_point_exactly(schedule, name, steps):
    grid = Grid.of(schedule, trailing(schedule, steps))
    end = sample(SAMPLERS[name], lambda x, t: torch.full_like(x, 0.7), grid.start(X), grid, noise)
    # Rounding errors in eps are multiplied by sigma/alpha, which is 20,000 at the end of the cosine schedule.
    worst = max(point.ratio for point in grid.points if point.alpha > 0)
    atol = 1e-12 + (1e-12 * worst**2 if name in ("lms", "pndm", "deis") else 0)
    torch.testing.assert_close(end, torch.full_like(X, 0.7), rtol=0, atol=atol)


@every_schedule
@pytest.mark.parametrize(
    ("solver", "bound"), [(euler, 2e-2), (heun, 2e-4), (SAMPLERS["dpmpp_2m"], 2e-4), (SAMPLERS["unipc"], 2e-4)]
)
def test_solvers_follow_the_exact_path_of_gaussian_data(schedule, solver, bound):
    """(x - alpha·m) / sqrt(alpha²·s² + sigma²) is constant along the path."""
    mean, std = 0.5, 0.3
    grid = log_snr_grid(schedule, 150)
    (start, width), (end, end_width) = (
        (point.alpha * mean, (point.alpha**2 * std**2 + point.sigma**2) ** 0.5)
        for point in (grid.points[0], grid.points[-1])
    )
    x = sample(solver, gaussian(schedule, mean, std), start + width * X, grid)
    torch.testing.assert_close(x, end + end_width * X, rtol=0, atol=bound)


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_euler_ancestral_is_ddim_with_the_same_noise(schedule, eta):
    grid, x, denoise = setup(schedule)
    torch.testing.assert_close(
        sample(partial(euler_a, eta=eta), denoise, x, grid, noise),
        sample(partial(ddim, eta=eta), denoise, x, grid, noise),
    )


@every_schedule
def test_edm_without_churn_is_heun(schedule):
    grid, x, denoise = setup(schedule)
    torch.testing.assert_close(sample(partial(edm, s_churn=0.0), denoise, x, grid), sample(heun, denoise, x, grid))


@pytest.mark.parametrize("solver", [edm, dpmpp_sde, partial(dpmpp_2s, eta=1.0), partial(ddpm)])
@pytest.mark.parametrize("schedule", [scaled_linear(), Flow()], ids=schedule_name)
def test_stochastic_solvers_keep_the_marginals_of_data_at_one_point(schedule, solver):
    """For data at a single point m, x_s is alpha_s·m + sigma_s·eps, whose mean and variance are checked at the end."""
    m, steps = 0.7, 6
    grid = log_snr_grid(schedule, steps)
    first, last = grid.points[0], grid.points[-1]
    x = torch.full((2 + 2 * steps, 1), first.alpha * m, dtype=torch.float64)
    x[1] += first.sigma

    def one_hot(draw):
        return torch.zeros_like(x).index_fill_(0, torch.tensor(2 + draw), 1.0)

    end = sample(solver, lambda x, t: torch.full_like(x, m), x, grid, one_hot).flatten()
    assert float(end[0]) == pytest.approx(last.alpha * m)
    assert float((end[1:] - end[0]).norm()) == pytest.approx(last.sigma)


def test_churn_raises_the_noise_level_within_the_range_of_the_schedule():
    times_called = []

    def denoise(x, t):
        times_called.append(t)
        return x / 2

    schedule = scaled_linear()
    grid = Grid.of(schedule, trailing(schedule, 3))
    sample(partial(edm, s_churn=1.0), denoise, grid.start(X), grid, noise)
    hat, at = (grid.at(t) for t in (times_called[2], grid.points[1].time))
    assert times_called[0] == grid.points[0].time  # the last index, beyond which the schedule has no noise level
    assert hat.ratio == pytest.approx(at.ratio * (1 + 1 / 3))


def test_dpmpp_2s_calls_at_midpoints_in_log_snr_or_at_every_second_point():
    def times(solver, grid):
        times_called = []

        def denoise(x, t):
            times_called.append(t)
            return x / 2

        sample(solver, denoise, X, grid)
        return times_called

    schedule = Flow()
    grid = log_snr_grid(schedule, 5)
    fine = log_snr_grid(schedule, 10)
    assert times(dpmpp_2s, grid) == pytest.approx([point.time for point in fine.points[:-1]])
    on_grid = partial(dpmpp_2s, on_grid=True)
    assert times(on_grid, fine) == [point.time for point in fine.points[:-1]]
    *_, wide = dpmpp_2s(mixture(schedule), X, Grid(grid.points[:5], schedule), noise)  # the last step is of first order
    *_, fine_end = (state for state in on_grid(mixture(schedule), X, fine, noise) if state.step < 8)
    torch.testing.assert_close(fine_end.x, wide.x)


@every_schedule
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_state_keeps_its_dtype(schedule, name):
    grid = Grid.of(schedule, trailing(schedule, 3))
    x = grid.start(X.float())
    end = sample(SAMPLERS[name], lambda x, t: x / 2, x, grid, lambda step: noise(step).float())
    assert end.dtype == torch.float32
