from functools import partial

import pytest
import torch

from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.sampling.driver import no_noise, sample
from ldm.sampling.grid import Grid
from ldm.sampling.noise_multistep import deis, lms, pndm
from ldm.sampling.one_step import ddim, euler
from ldm.sampling.spacing import trailing
from ldm.sampling.step import noise_weights
from tests.closed_form import SCHEDULES, log_snr_grid, mixture, schedule_name, states

X = states()
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)


@every_schedule
@pytest.mark.parametrize("solver", [lms, deis])
def test_the_first_step_is_ddim(schedule, solver):
    grid = Grid.of(schedule, trailing(schedule, 10))
    first, expected = (next(s(mixture(schedule), grid.start(X), grid, no_noise)).x for s in (solver, ddim))
    torch.testing.assert_close(first, expected)


@every_schedule
def test_lms_of_order_1_is_euler_and_of_order_3_is_deis_in_the_ratio(schedule):
    grid, denoise = log_snr_grid(schedule, 9), mixture(schedule)
    torch.testing.assert_close(sample(partial(lms, order=1), denoise, X, grid), sample(euler, denoise, X, grid))
    rho = partial(deis, order=3, variable="ratio", lower_order_final=False)
    torch.testing.assert_close(sample(partial(lms, order=3), denoise, X, grid), sample(rho, denoise, X, grid))


@pytest.mark.parametrize("variable", ["time", "ratio", "log_ratio"])
def test_noise_weights_integrate_quadratic_polynomials_exactly(variable):
    """The reference integrates 1, v and v² of the variable v over sigma/alpha by a fine trapezoidal sum."""
    grid = log_snr_grid(Flow(), 4)
    *_, c, b, t, s = grid.points
    value = {"time": lambda p: p.time, "ratio": lambda p: p.ratio, "log_ratio": lambda p: -p.log_snr / 2}[variable]
    weights = noise_weights(variable, grid, t, s, [t, b, c])
    steps = torch.linspace(0, 1, 20001, dtype=torch.float64)
    logs = (-t.log_snr / 2) + (t.log_snr - s.log_snr) / 2 * steps
    ratios = logs.exp()
    v = {"time": ratios / (1 + ratios), "ratio": ratios, "log_ratio": logs}[variable]
    for power in range(3):
        expected = torch.trapezoid(v**power, ratios)
        actual = sum(w * value(p) ** power for w, p in zip(weights, [t, b, c], strict=True))
        assert actual == pytest.approx(float(expected), rel=1e-7)


def test_pndm_makes_four_calls_in_each_of_three_steps_and_plms_two_in_one():
    def calls(solver, steps=6):
        times = []
        grid = Grid.of(scaled_linear(), trailing(scaled_linear(), steps))

        def denoise(x, t):
            times.append(t)
            return x / 2

        sample(solver, denoise, X, grid)
        return times

    grid = trailing(scaled_linear(), 6).tolist()
    middle = (grid[0] + grid[1]) / 2
    assert calls(pndm)[:5] == [grid[0], middle, middle, grid[1], grid[1]] and len(calls(pndm)) == 15
    assert calls(partial(pndm, prk=False))[:3] == [grid[0], grid[1], grid[1]]
    assert len(calls(partial(pndm, prk=False))) == 7


@pytest.mark.parametrize("solver", [lms, deis, pndm])
def test_the_step_from_pure_noise_is_ddim_and_leaves_no_history(solver):
    """The second step equals the first step of sampling that starts there."""
    grid, denoise = Grid.of(Flow(), trailing(Flow(), 10)), mixture(Flow())
    run = solver(denoise, grid.start(X), grid, no_noise)
    first, second = next(run), next(run)
    torch.testing.assert_close(first.x, next(ddim(denoise, grid.start(X), grid, no_noise)).x)
    rest = Grid(grid.points[1:], Flow())
    torch.testing.assert_close(second.x, next(solver(denoise, first.x, rest, no_noise)).x)
