import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import COEFFICIENTS, Prediction
from ldm.diffusion.schedule import Flow, scaled_linear
from tests.closed_form import states

X, CONDITIONING = states(3).float(), Conditioning()


def time_read(schedule, t, time=None):
    """The time that the denoiser passes to the network."""
    times = []

    def network(x, time, conditioning):
        times.append(time)
        return x

    Denoiser(network, schedule, Prediction("v"), time)(X, t, CONDITIONING)
    return times[0]


def test_on_a_discrete_schedule_the_network_reads_the_index():
    assert time_read(scaled_linear(), 417.0).tolist() == [417, 417, 417]


def test_on_the_flow_schedule_the_network_reads_1000_times_t():
    assert time_read(Flow(), torch.tensor([0.25, 0.5, 1.0])).tolist() == [250, 500, 1000]


def test_the_time_that_the_network_reads_at_a_noise_level_ignores_the_shift():
    t = Flow(shift=3.0).time(Flow().log_snr(torch.tensor([0.5])))
    torch.testing.assert_close(time_read(Flow(shift=3.0), float(t)), time_read(Flow(), 0.5))


def test_log_sigma_is_a_quarter_of_the_log_of_sigma_over_alpha():
    schedule, t = scaled_linear(), torch.tensor([100.0, 500.0, 900.0])
    expected = (schedule.sigma(t) / schedule.alpha(t)).log() / 4
    torch.testing.assert_close(time_read(schedule, t, "log_sigma").double(), expected, rtol=1e-6, atol=1e-6)


def test_index_times_are_refused_on_the_flow_schedule():
    with pytest.raises(ValueError, match="schedule=flow has no indices: use time=thousand or time=log_sigma"):
        time_read(Flow(), 0.5, "index")


def test_an_unknown_time_encoding_is_refused():
    with pytest.raises(ValueError, match="must be one of index, thousand, log_sigma"):
        time_read(Flow(), 0.5, "minutes")


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_a_network_that_outputs_the_target_denoises_exactly(name):
    schedule, prediction, t = scaled_linear(), Prediction(name), torch.tensor([5.0, 400.0, 990.0])
    x0, eps = states(3), states(3).flip(0)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * eps
    denoiser = Denoiser(lambda *_: prediction.target(x0, eps, alpha, sigma), schedule, prediction)
    torch.testing.assert_close(denoiser(x, t, CONDITIONING), x0, rtol=1e-9, atol=1e-9)


def test_x0_has_the_dtype_of_x_when_the_network_outputs_bfloat16():
    denoiser = Denoiser(lambda x, *_: x.bfloat16(), scaled_linear(), Prediction("eps"))
    assert denoiser(X, 500.0, CONDITIONING).dtype == torch.float32
