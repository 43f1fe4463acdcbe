import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import COEFFICIENTS, Prediction
from ldm.diffusion.schedule import Flow, scaled_linear
from tests.closed_form import states

X, CONDITIONING = states(3).float(), Conditioning()


def told(schedule, t, time=None):
    """The times that the network hears."""
    heard = []

    def network(x, time, conditioning):
        heard.append(time)
        return x

    Denoiser(network, schedule, Prediction("v"), time)(X, t, CONDITIONING)
    return heard[0]


def test_on_a_discrete_schedule_the_network_is_told_the_index():
    assert told(scaled_linear(), 417.0).tolist() == [417, 417, 417]


def test_on_flow_the_network_is_told_a_thousand_times_t():
    assert told(Flow(), torch.tensor([0.25, 0.5, 1.0])).tolist() == [250, 500, 1000]


def test_a_shift_changes_which_t_but_not_what_the_network_is_told_about_a_noise_level():
    t = Flow(shift=3.0).time(Flow().log_snr(torch.tensor([0.5])))
    torch.testing.assert_close(told(Flow(shift=3.0), float(t)), told(Flow(), 0.5))


def test_log_sigma_is_a_quarter_of_the_logarithm_of_sigma_over_alpha():
    schedule, t = scaled_linear(), torch.tensor([100.0, 500.0, 900.0])
    expected = (schedule.sigma(t) / schedule.alpha(t)).log() / 4
    torch.testing.assert_close(told(schedule, t, "log_sigma").double(), expected, rtol=1e-6, atol=1e-6)


def test_flow_has_no_index_to_tell():
    with pytest.raises(ValueError, match="schedule=flow has no indices"):
        told(Flow(), 0.5, "index")


def test_an_unknown_time_is_refused():
    with pytest.raises(ValueError, match="must be one of index, thousand, log_sigma"):
        told(Flow(), 0.5, "minutes")


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_a_network_that_outputs_the_target_gives_the_data(name):
    schedule, prediction, t = scaled_linear(), Prediction(name), torch.tensor([5.0, 400.0, 990.0])
    x0, eps = states(3), states(3).flip(0)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * eps
    denoiser = Denoiser(lambda *_: prediction.target(x0, eps, alpha, sigma), schedule, prediction)
    torch.testing.assert_close(denoiser(x, t, CONDITIONING), x0, rtol=1e-9, atol=1e-9)


def test_a_bfloat16_output_still_gives_data_in_the_type_of_the_state():
    denoiser = Denoiser(lambda x, *_: x.bfloat16(), scaled_linear(), Prediction("eps"))
    assert denoiser(X, 500.0, CONDITIONING).dtype == torch.float32
