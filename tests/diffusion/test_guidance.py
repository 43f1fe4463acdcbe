import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import scaled_linear
from tests.closed_form import states

X = states(4)
CONTEXT, NEGATIVE = states(4)[:, 0] + 1, states(4)[:, 0] - 1  # (b, 2, 2)
T = 600.0


class Counting:
    """x0 = tanh(x + mean context), and the batch size of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, context):
        self.calls.append(len(x))
        return torch.tanh(x + context.mean((1, 2)).view(-1, 1, 1, 1))


def test_guidance_moves_away_from_the_negative_context():
    network = Counting()
    positive, negative = network(X, T, CONTEXT), network(X, T, NEGATIVE)
    guided = classifier_free(network, CONTEXT, NEGATIVE, 7.5)(X, T)
    torch.testing.assert_close(guided, negative + 7.5 * (positive - negative))


def test_one_batched_call_equals_two_in_sequence():
    together, apart = Counting(), Counting()
    first = classifier_free(together, CONTEXT, NEGATIVE, 3.0)(X, T)
    second = classifier_free(apart, CONTEXT, NEGATIVE, 3.0, batched=False)(X, T)
    torch.testing.assert_close(first, second)
    assert together.calls == [8] and apart.calls == [4, 4]


def test_a_scale_of_one_is_one_plain_call():
    network = Counting()
    guided = classifier_free(network, CONTEXT, NEGATIVE, 1.0)(X, T)
    assert network.calls == [4] and torch.equal(guided, network(X, T, CONTEXT))


def test_each_sample_may_have_its_own_scale():
    scales = torch.tensor([1.0, 2.0, 5.0, 0.0])
    guided = classifier_free(Counting(), CONTEXT, NEGATIVE, scales)(X, T)
    for i, scale in enumerate(scales.tolist()):
        alone = classifier_free(Counting(), CONTEXT[i : i + 1], NEGATIVE[i : i + 1], scale)(X[i : i + 1], T)
        torch.testing.assert_close(guided[i : i + 1], alone)


def test_outside_its_interval_guidance_is_off():
    network = Counting()
    denoise = classifier_free(network, CONTEXT, NEGATIVE, 3.0, interval=(200.0, 700.0))
    for t in (100.0, 200.0, 700.0, 701.0):
        denoise(X, t)
    assert network.calls == [4, 8, 8, 4]


def test_guidance_on_data_is_guidance_on_noise():
    schedule, prediction, t = scaled_linear(), Prediction("eps"), torch.full((4,), T)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    network = Counting()
    guided = classifier_free(Denoiser(network, schedule, prediction), CONTEXT, NEGATIVE, 7.5)(X, T)
    positive, negative = network(X, t, CONTEXT), network(X, t, NEGATIVE)
    on_noise = prediction.to_x0(X, negative + 7.5 * (positive - negative), alpha, sigma)
    torch.testing.assert_close(guided, on_noise, rtol=1e-10, atol=1e-10)


def test_contexts_of_two_shapes_cannot_be_batched():
    with pytest.raises(ValueError, match="pad them to one shape, or set batched=False"):
        classifier_free(Counting(), CONTEXT, NEGATIVE[:, :1], 3.0)
