from functools import partial

import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.sampling.driver import SAMPLERS, Cancelled, get_solver, sample
from ldm.sampling.grid import Grid
from ldm.sampling.one_step import ddim, ddpm, euler
from ldm.sampling.spacing import trailing
from tests.closed_form import mixture, states

X = states(4)
GRID = Grid.of(scaled_linear(), trailing(scaled_linear(), 5))


def test_each_preview_receives_the_estimate_of_x0():
    estimates, previews = [], []

    def denoise(x, t):
        estimates.append(mixture(scaled_linear())(x, t))
        return estimates[-1]

    sample(euler, denoise, X, GRID, on_preview=lambda step, x0: previews.append((step, x0)))
    assert [step for step, _ in previews] == [*range(5)]
    assert all(preview is x0 for (_, preview), x0 in zip(previews, estimates, strict=True))


def test_steps_are_counted_and_previews_arrive_at_the_given_interval():
    steps, previews = [], []
    sample(
        euler,
        mixture(scaled_linear()),
        X,
        GRID,
        on_step=lambda *progress: steps.append(progress),
        on_preview=lambda step, x0: previews.append(step),
        preview_every=2,
    )
    assert steps == [(step, 5) for step in range(5)] and previews == [1, 3]


def test_cancelling_stops_sampling_after_the_current_step():
    steps = []
    with pytest.raises(Cancelled, match="cancelled after step 2 of 5"):
        sample(
            euler,
            mixture(scaled_linear()),
            X,
            GRID,
            on_step=lambda *progress: steps.append(progress),
            cancelled=lambda: len(steps) == 2,
        )
    assert len(steps) == 2


def test_a_state_that_is_not_finite_is_not_shown_in_a_preview():
    shown = []
    with pytest.raises(FloatingPointError, match="step 2 of 5"):
        broken = GRID.points[1].time
        denoise = lambda x, t: x * (float("nan") if t == broken else 1)  # noqa: E731
        sample(euler, denoise, X, GRID, on_preview=lambda step, x0: shown.append(step), preview_every=3)
    assert shown == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddimm", {}, "sampler is 'ddimm', but must be one of ddpm, ddim"),
        ("ddim", {"order": 2}, "sampler=ddim has no option 'order'; its options are: eta"),
        ("euler", {"eta": 1.0}, "sampler=euler has no option 'eta'; its options are: none"),
        ("ddim", {"eta": 1.5}, "eta is 1.5, but must be a number from 0.0 to 1.0"),
        ("euler_a", {"eta": -0.1}, "eta is -0.1"),
        ("dpmpp_2m_sde", {"eta": float("nan")}, "eta is nan"),
        ("dpmpp_sde", {"eta": "1"}, "eta is '1'"),
        ("unipc", {"order": 4}, "order is 4, but must be a whole number from 1 to 3"),
        ("lms", {"order": 2.5}, "order is 2.5, but must be a whole number"),
        ("deis", {"variable": "rho"}, "variable is 'rho', but must be one of time, ratio, log_ratio"),
        ("heun", {"path": "vp"}, "path is 'vp', but must be one of edm, flow"),
        ("edm", {"s_churn": -1.0}, "s_churn is -1.0, but must be a number of at least 0.0"),
        ("edm", {"s_tmin": 9.0, "s_tmax": 1.0}, "s_tmin is 9.0, but must be a number from 0.0 to 1.0"),
        ("pndm", {"prk": "false"}, "sampler=pndm's option prk is 'false', but must be true or false"),
        (["ddim"], {}, r"sampler is \['ddim'\], but must be one of"),
    ],
)
def test_unknown_samplers_and_invalid_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_solver(name, options)


def test_get_solver_binds_the_options():
    grid, denoise = GRID, mixture(scaled_linear())
    chosen = sample(get_solver("ddim", {"eta": 1.0}), denoise, X, grid, lambda draw: X)
    assert torch.equal(chosen, sample(partial(ddim, eta=1.0), denoise, X, grid, lambda draw: X))


def test_sampling_records_no_gradients():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert not sample(euler, lambda x, t: weight * x, X, GRID).requires_grad


def test_the_initial_state_is_not_modified():
    x = X.clone()
    for solver in SAMPLERS.values():
        sample(solver, lambda x, t: x / 2, x, GRID, lambda step: X)
    assert torch.equal(x, X)


def test_the_first_step_with_a_state_that_is_not_finite_is_reported():
    broken = GRID.points[2].time
    message = rf"step 3 of 5 \(time {broken:g}, sigma 0\.\d+\): the network most likely overflowed"
    with pytest.raises(FloatingPointError, match=message):
        sample(euler, lambda x, t: x * (float("inf") if t == broken else 1), X, GRID)


def test_the_error_names_eps_prediction_from_pure_noise_as_the_cause():
    flow = Flow()
    denoiser = Denoiser(lambda x, *_: x / 2, flow, Prediction("eps"))
    context = torch.zeros(4, 1, 1)
    with pytest.raises(
        FloatingPointError,
        match=r"step 1 of 4 .*: eps-prediction divides by alpha, which is 0 there, so .* the network most likely over",
    ):
        sample(euler, lambda x, t: denoiser(x, t, context), X, Grid.of(flow, trailing(flow, 4)))


def test_a_stochastic_sampler_without_noise_is_refused():
    with pytest.raises(ValueError, match="pass it as `noise`"):
        sample(ddpm, mixture(scaled_linear()), X, GRID)
