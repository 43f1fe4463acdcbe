import numpy as np
import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import diffusion_loss
from ldm.diffusion.prediction import COEFFICIENTS, Prediction
from ldm.diffusion.weighting import WEIGHTINGS, min_snr, uniform
from tests.closed_form import SCHEDULES, schedule_name, states

X0, EPS, CONDITIONING = states(8), states(8).flip(0), Conditioning()


def loss(schedule, name, weighting, error, huber=None):
    """The loss of a network whose output differs from the target by `error`, and the times."""
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64) * schedule.t_max
    prediction = Prediction(name)
    target = prediction.target(X0, EPS, schedule.alpha(t), schedule.sigma(t))
    denoiser = Denoiser(lambda *_: target + error, schedule, prediction)
    return diffusion_loss(denoiser, X0, EPS, t, CONDITIONING, weighting, huber), t


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("weighting", [make() for make in WEIGHTINGS.values()], ids=WEIGHTINGS)
def test_the_loss_is_zero_for_a_perfect_denoiser_only(schedule, name, weighting):
    assert torch.equal(loss(schedule, name, weighting, 0.0)[0], torch.zeros(8, dtype=torch.float64))
    assert (loss(schedule, name, weighting, 0.5)[0] > 0).all()


def test_the_uniform_loss_is_the_mean_squared_error_per_sample():
    error = torch.arange(8, dtype=torch.float64).view(-1, 1, 1, 1)
    torch.testing.assert_close(loss(SCHEDULES[0], "eps", uniform(), error)[0], torch.arange(8).double() ** 2)


def test_the_weight_multiplies_the_squared_error():
    weighted, t = loss(SCHEDULES[0], "v", min_snr(), 2.0)
    snr = SCHEDULES[0].log_snr(t).exp()
    torch.testing.assert_close(weighted, 4 * snr.clamp(max=5) / (snr + 1))


def test_the_network_reads_noisy_data_and_receives_gradients():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    schedule, t = SCHEDULES[0], torch.full((8,), 300.0)
    denoiser = Denoiser(lambda x, *_: weight * x, schedule, Prediction("x0"))
    diffusion_loss(denoiser, X0, EPS, t, CONDITIONING, uniform()).mean().backward()
    alpha, sigma = schedule.alpha(t[:1]), schedule.sigma(t[:1])
    x = alpha * X0 + sigma * EPS
    torch.testing.assert_close(weight.grad, (2 * (x - X0) * x).mean())


def test_huber_is_quadratic_for_small_errors_and_linear_beyond():
    error = torch.tensor([1e-6, 0.1, 0.3, 0.5, 3.0, -3.0, 100.0, 0.0]).double().view(-1, 1, 1, 1)
    inside = error.abs() <= 0.3
    expected = torch.where(inside, error**2, 0.3**2 + 2 * 0.3 * (error.abs() - 0.3)).flatten()
    torch.testing.assert_close(loss(SCHEDULES[0], "eps", uniform(), error, huber=0.3)[0], expected)


def test_a_mask_weights_the_mean_over_pixels():
    error, mask = states(8) + 1, torch.rand(8, 1, *X0.shape[2:], dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64) * SCHEDULES[0].t_max
    denoiser = Denoiser(lambda *_: EPS + error, SCHEDULES[0], Prediction("eps"))
    masked = diffusion_loss(denoiser, X0, EPS, t, CONDITIONING, uniform(), mask=mask)
    expected = [
        np.average(e.square().numpy(), weights=m.expand_as(e).numpy()) for e, m in zip(error, mask, strict=True)
    ]
    np.testing.assert_allclose(masked, expected, rtol=1e-12)


def test_a_full_mask_has_no_effect_and_pixels_of_weight_zero_are_ignored():
    error, t = states(8), torch.full((8,), 0.5 * SCHEDULES[0].t_max, dtype=torch.float64)
    outside = torch.zeros(8, 1, *X0.shape[2:], dtype=torch.float64)
    outside[:, :, :1] = 1

    def masked(error, mask):
        denoiser = Denoiser(lambda *_: EPS + error, SCHEDULES[0], Prediction("eps"))
        return diffusion_loss(denoiser, X0, EPS, t, CONDITIONING, uniform(), mask=mask)

    torch.testing.assert_close(masked(error, torch.ones_like(outside)), masked(error, None))
    assert torch.equal(masked(1e6 * error * (1 - outside), outside), torch.zeros(8, dtype=torch.float64))
