import pytest
import torch

from ldm.diffusion.denoiser import NETWORK_TIMES, Denoiser
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.loss import diffusion_loss
from ldm.diffusion.prediction import COEFFICIENTS, Prediction
from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.diffusion.weighting import min_snr, uniform
from ldm.lint import contradictions
from ldm.sampling.driver import sample
from ldm.sampling.grid import Grid
from ldm.sampling.one_step import euler
from ldm.sampling.spacing import SPACINGS, leading, trailing
from tests.closed_form import SCHEDULES, gaussian, schedule_name, states

FLOW, SD = Flow(), scaled_linear()
V, EPS = Prediction("v"), Prediction("eps")
END = torch.ones(1, dtype=torch.float64)


def only(found):
    """The one sentence that was found."""
    (sentence,) = found
    assert sentence.count(". ") == 0
    return sentence


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_what_works_on_every_schedule_is_not_complained_about(schedule, prediction, spacing):
    assert contradictions(schedule, Prediction(prediction), uniform(), spacing=spacing) == []


@pytest.mark.parametrize("prediction", COEFFICIENTS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("time", NETWORK_TIMES)
def test_stable_diffusion_s_schedule_goes_with_everything(prediction, spacing, time):
    settings = {"spacing": spacing, "time": time, "interval": (100.0, 800.0)}
    assert contradictions(SD, Prediction(prediction), min_snr(), **settings) == []


def test_eps_on_flow_is_refused_because_no_data_come_back_from_pure_noise():
    sentence = only(contradictions(FLOW, EPS))
    assert "prediction=eps" in sentence and "schedule=flow" in sentence and "use prediction=v" in sentence
    eps = states(1)
    for name, comes_back in (("eps", False), ("v", True), ("flow", True)):
        prediction = Prediction(name)
        out = prediction.target(eps + 1, eps, 0 * END, END)
        assert torch.allclose(prediction.to_x0(eps, out, 0 * END, END), eps + 1) == comes_back


def test_min_snr_on_flow_is_refused_because_the_first_sampling_step_is_not_trained():
    sentence = only(contradictions(FLOW, V, min_snr()))
    assert "weighting=min_snr" in sentence and "schedule=flow" in sentence and "weighting=uniform" in sentence
    x0 = states(1)
    denoiser = Denoiser(lambda x, *_: x + 1e3, FLOW, V)  # wrong everywhere, but costs nothing at the end
    at_end, inside = (
        float(diffusion_loss(denoiser, x0, x0.flip(1), t * END, torch.zeros(1, 1, 1), min_snr())) for t in (1, 0.5)
    )
    assert at_end < 1e-100 and inside > 1


def test_log_sigma_on_flow_is_refused_because_it_is_infinite():
    sentence = only(contradictions(FLOW, V, time="log_sigma"))
    assert "time=log_sigma" in sentence and "schedule=flow" in sentence and "time=thousand" in sentence
    assert NETWORK_TIMES["log_sigma"](FLOW, END).isinf() and NETWORK_TIMES["thousand"](FLOW, END).isfinite()


def test_leading_spacing_on_flow_is_refused_because_the_mean_of_the_data_is_missed():
    sentence = only(contradictions(FLOW, V, spacing="leading"))
    assert "spacing=leading" in sentence and "schedule=flow" in sentence and "use spacing=trailing" in sentence
    mean, x = 2.0, states(2000)
    ends = {}
    for spacing in (leading, trailing):
        grid = Grid.of(FLOW, spacing(FLOW, 10))
        ends[spacing] = float(sample(euler, gaussian(FLOW, mean, 0.2), grid.start(x), grid).mean())
    assert ends[trailing] == pytest.approx(mean, abs=0.01) and ends[leading] < mean - 0.03


def test_a_guidance_interval_in_another_schedule_s_times_is_refused_because_it_never_acts():
    interval = (200.0, 800.0)
    sentence = only(contradictions(FLOW, V, interval=interval))
    assert "interval (200.0, 800.0)" in sentence and "schedule=flow" in sentence
    context, x = torch.ones(4, 1, 1), states(4)

    def denoiser(x, t, context):
        return x + context.view(-1, 1, 1, 1)

    guided = classifier_free(denoiser, context, -context, 7.5, interval)
    assert all(torch.equal(guided(x, t), denoiser(x, t, context)) for t in trailing(FLOW, 10).tolist())
