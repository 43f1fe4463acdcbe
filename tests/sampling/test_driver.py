import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.sampling.driver import SAMPLERS, sample
from ldm.sampling.grid import Grid
from ldm.sampling.one_step import ddpm, euler
from ldm.sampling.spacing import trailing
from tests.closed_form import mixture, states

X = states(4)
GRID = Grid.of(scaled_linear(), trailing(scaled_linear(), 5))


def test_every_step_is_told_with_what_the_denoiser_said():
    said, told = [], []

    def denoise(x, t):
        said.append(mixture(scaled_linear())(x, t))
        return said[-1]

    sample(euler, denoise, X, GRID, on_step=lambda *news: told.append(news))
    assert [news[:2] for news in told] == [(step, 5) for step in range(5)]
    assert all(news[2] is x0 for news, x0 in zip(told, said, strict=True))


def test_no_graph_is_kept():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert not sample(euler, lambda x, t: weight * x, X, GRID).requires_grad


def test_the_given_state_is_not_written_to():
    x = X.clone()
    for solver in SAMPLERS.values():
        sample(solver, lambda x, t: x / 2, x, GRID, lambda step: X)
    assert torch.equal(x, X)


def test_a_state_that_breaks_is_reported_with_the_first_step_at_which_it_did():
    broken = GRID.points[2].time
    message = rf"step 3 of 5 \(time {broken:g}, sigma 0\.\d+\): the network most likely overflowed"
    with pytest.raises(FloatingPointError, match=message):
        sample(euler, lambda x, t: x * (float("inf") if t == broken else 1), X, GRID)


def test_eps_prediction_from_pure_noise_is_reported_with_its_cause():
    flow = Flow()
    denoiser = Denoiser(lambda x, *_: x / 2, flow, Prediction("eps"))
    context = torch.zeros(4, 1, 1)
    with pytest.raises(FloatingPointError, match=r"step 1 of 4 .*alpha is 0 there.*use prediction v or flow"):
        sample(euler, lambda x, t: denoiser(x, t, context), X, Grid.of(flow, trailing(flow, 4)))


def test_a_sampler_that_draws_noise_asks_for_it():
    with pytest.raises(ValueError, match="pass it as `noise`"):
        sample(ddpm, mixture(scaled_linear()), X, GRID)
