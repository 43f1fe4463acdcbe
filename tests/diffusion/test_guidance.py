import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import autoguidance, classifier_free, guided, interval_to_times, rescaled
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import scaled_linear
from ldm.sampling.driver import sample
from ldm.sampling.grid import Grid
from ldm.sampling.one_step import ddim
from ldm.sampling.spacing import trailing
from tests.closed_form import EVERY_SCHEDULE, SCHEDULES, gaussian, schedule_name, states

X = states(4)
POSITIVE, NEGATIVE = Conditioning(text=states(4)[:, 0] + 1), Conditioning(text=states(4)[:, 0] - 1)  # (b, 2, 2)
SHORTER = NEGATIVE.map(lambda text: text[:, :1])
T = 600.0


class Counting:
    """A denoiser with x0 = tanh(x + mean text), which records the number of conditionings in each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, conditioning):
        self.calls.append(len(conditioning))
        means = conditioning.get("text").mean((1, 2)).view(-1, 1, 1, 1)
        return torch.tanh(x.repeat(len(means) // len(x), 1, 1, 1) + means)


def test_guidance_moves_away_from_the_negative_conditioning():
    network = Counting()
    positive, negative = network(X, T, POSITIVE), network(X, T, NEGATIVE)
    guided = classifier_free(network, POSITIVE, NEGATIVE, 7.5)(X, T)
    torch.testing.assert_close(guided, negative + 7.5 * (positive - negative))


def test_one_batched_call_equals_two_sequential_calls():
    batched, sequential = Counting(), Counting()
    first = classifier_free(batched, POSITIVE, NEGATIVE, 3.0)(X, T)
    second = classifier_free(sequential, POSITIVE, NEGATIVE, 3.0, batched=False)(X, T)
    torch.testing.assert_close(first, second)
    assert batched.calls == [8] and sequential.calls == [4, 4]


def test_a_scale_of_one_calls_the_denoiser_once_without_guidance():
    network = Counting()
    guided = classifier_free(network, POSITIVE, NEGATIVE, 1.0)(X, T)
    assert network.calls == [4] and torch.equal(guided, network(X, T, POSITIVE))


def test_each_sample_may_have_its_own_scale():
    scales = torch.tensor([1.0, 2.0, 5.0, 0.0])
    guided = classifier_free(Counting(), POSITIVE, NEGATIVE, scales)(X, T)
    for i, scale in enumerate(scales.tolist()):
        alone = classifier_free(Counting(), POSITIVE[i : i + 1], NEGATIVE[i : i + 1], scale)(X[i : i + 1], T)
        torch.testing.assert_close(guided[i : i + 1], alone)


def test_guidance_is_off_outside_its_interval():
    network = Counting()
    denoise = classifier_free(network, POSITIVE, NEGATIVE, 3.0, interval=(200.0, 700.0))
    for t in (100.0, 200.0, 700.0, 701.0):
        denoise(X, t)
    assert network.calls == [4, 8, 8, 4]


def test_guidance_on_x0_equals_guidance_on_eps():
    schedule, prediction, t = scaled_linear(), Prediction("eps"), torch.full((4,), T)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    network = Counting()
    guided = classifier_free(Denoiser(network, schedule, prediction), POSITIVE, NEGATIVE, 7.5)(X, T)
    positive, negative = network(X, t, POSITIVE), network(X, t, NEGATIVE)
    guided_eps = negative + 7.5 * (positive - negative)
    expected = prediction.to_x0(X, guided_eps, alpha, sigma)
    torch.testing.assert_close(guided, expected, rtol=1e-10, atol=1e-10)


def test_texts_of_two_lengths_cannot_be_batched():
    with pytest.raises(ValueError, match="different fields or shapes cannot be batched"):
        classifier_free(Counting(), POSITIVE, SHORTER, 3.0)


def test_texts_of_two_lengths_can_be_evaluated_sequentially():
    network = Counting()
    guided = classifier_free(network, POSITIVE, SHORTER, 3.0, batched=False)(X, T)
    positive, negative = network(X, T, POSITIVE), network(X, T, SHORTER)
    torch.testing.assert_close(guided, negative + 3 * (positive - negative))


@pytest.mark.parametrize("negatives", [1, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_numbers_of_positive_and_negative_conditionings_must_be_equal(negatives, batched):
    with pytest.raises(ValueError, match=f"there are 4 conditionings but {negatives} negative ones"):
        classifier_free(Counting(), POSITIVE, NEGATIVE[:negatives], 3.0, batched=batched)


def test_each_prompt_may_have_its_own_negative_prompt():
    guided = classifier_free(Counting(), POSITIVE, NEGATIVE, 3.0)(X, T)
    for i in range(4):
        alone = classifier_free(Counting(), POSITIVE[i : i + 1], NEGATIVE[i : i + 1], 3.0)(X[i : i + 1], T)
        torch.testing.assert_close(guided[i : i + 1], alone)


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, torch.tensor([1.0, 2.0, torch.nan, 1.0])])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match="must be finite"):
        classifier_free(Counting(), POSITIVE, NEGATIVE, scale)


@pytest.mark.parametrize("shape", [(3,), (4, 1), (1,)])
def test_scales_that_do_not_have_the_shape_of_the_batch_are_refused(shape):
    with pytest.raises(ValueError, match="do not fit 4 conditionings"):
        classifier_free(Counting(), POSITIVE, NEGATIVE, torch.ones(shape))


@pytest.mark.parametrize("rescale", [-0.1, 1.1, torch.nan])
def test_a_rescale_outside_0_to_1_is_refused(rescale):
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        classifier_free(Counting(), POSITIVE, NEGATIVE, 3.0, rescale=rescale)


def test_autoguidance_moves_away_from_the_weak_model():
    schedule = scaled_linear()
    strong, weak = gaussian(schedule, 1.0, 0.2), gaussian(schedule, 1.0, 0.6)
    expected = weak(X, T) + 2 * (strong(X, T) - weak(X, T))
    assert torch.equal(autoguidance(strong, weak, 2.0)(X, T), expected)
    assert torch.equal(autoguidance(strong, weak, 2.0, interval=(0.0, 500.0))(X, T), strong(X, T))
    assert torch.equal(autoguidance(strong, weak, 1.0)(X, T), strong(X, T))


def test_autoguidance_by_a_wider_model_corrects_a_too_wide_model():
    """Guiding the denoiser of too wide data away from that of even wider data samples nearly the true width."""
    schedule, std = SCHEDULES[0], 0.3
    grid = Grid.of(schedule, trailing(schedule, 100))
    x = grid.start(states(500))
    plain, weak = gaussian(schedule, 0.0, 1.5 * std), gaussian(schedule, 0.0, 2.0 * std)
    guided = autoguidance(plain, weak, 2.0)
    error, corrected = (float(sample(ddim, denoise, x, grid).std()) - std for denoise in (plain, guided))
    assert error > 0.1 and abs(corrected) < error / 3


def test_rescaling_follows_equation_16_of_lin_et_al():
    x0, reference = states(4) * 3 + 1, states(4).flip(0)
    std = [part.flatten(1).std(1).view(-1, 1, 1, 1) for part in (reference, x0)]
    expected = 0.7 * x0 * (std[0] / std[1]) + 0.3 * x0
    torch.testing.assert_close(rescaled(x0, reference, 0.7), expected)


def test_rescaling_restores_the_contrast_that_guidance_increases():
    """The mean image is ±0.8 with the prompt, and 0 without it."""
    schedule, image = SCHEDULES[0], torch.tensor([[0.8, -0.8], [-0.8, 0.8]], dtype=torch.float64)
    positive, negative = gaussian(schedule, image, 0.1), gaussian(schedule, torch.zeros(2, 2), 0.1)
    grid = Grid.of(schedule, trailing(schedule, 50))
    contrast = {}
    for scale, rescale in ((1.0, 0.0), (7.5, 0.0), (7.5, 1.0)):
        denoise = guided(positive, lambda x, t: (positive(x, t), negative(x, t)), scale, rescale=rescale)
        contrast[scale, rescale] = float(sample(ddim, denoise, grid.start(states(50)), grid).mul(image.sign()).mean())
    assert contrast[1.0, 0.0] == pytest.approx(0.8, abs=0.05)
    assert contrast[7.5, 0.0] > 5 and contrast[7.5, 1.0] == pytest.approx(0.8, abs=0.15)


def test_rescaling_a_constant_image_is_finite():
    flat = torch.ones(2, 3, 4, 4)
    assert rescaled(flat, flat, 1.0).isfinite().all()


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
def test_interval_to_times_selects_exactly_the_times_in_the_interval(schedule):
    low, high = interval_to_times(schedule, (0.3, 5.0))
    t = torch.linspace(schedule.t_min, schedule.t_max, 1000, dtype=torch.float64)
    ratio = schedule.sigma(t) / schedule.alpha(t)
    inside = (ratio >= 0.3) & (ratio <= 5.0)
    assert torch.equal(inside, (t >= low) & (t <= high)) and inside.any() and not inside.all()


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
def test_an_interval_may_be_unbounded(schedule):
    low, high = interval_to_times(schedule, (0.0, torch.inf))
    assert interval_to_times(schedule, (0.0, None)) == (low, high)
    assert low <= schedule.t_min and high >= schedule.t_max


@pytest.mark.parametrize("interval", [(5.0, 0.3), (-1.0, 2.0), (1.0, 1.0), (torch.nan, 1.0)])
def test_an_empty_or_invalid_interval_is_refused(interval):
    with pytest.raises(ValueError, match="a low and a high sigma/alpha"):
        interval_to_times(SCHEDULES[0], interval)
