import pytest
import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Flow, Schedule, cosine, linear
from ldm.metrics.noise_loss import LEVELS, noise_loss, sample_count


def batches(*sizes: int) -> list[tuple[Tensor, Conditioning, Tensor]]:
    """Returns batches of latents with unit variance, with ids that count from 0."""
    x0 = torch.randn(sum(sizes), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(sum(sizes))
    return [(a, Conditioning(), b) for a, b in zip(x0.split(sizes), ids.split(sizes), strict=True)]


def ideal(schedule: Schedule, prediction: str) -> Denoiser:
    """Returns the optimal denoiser of unit normal data: E[x0 | x] = x·alpha / (alpha² + sigma²)."""
    denoiser = Denoiser(lambda x, t, c: x, schedule, Prediction(prediction))

    def network(x: Tensor, _: Tensor, conditioning: Conditioning) -> Tensor:
        t = network.t  # type: ignore[attr-defined]
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x0 = x * alpha / (alpha**2 + sigma**2)
        return denoiser.prediction.target(x0, (x - alpha * x0) / sigma, alpha.expand(len(x)), sigma.expand(len(x)))

    original = denoiser.output

    def output(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        network.t = t[0]  # type: ignore[attr-defined]
        return original(x, t, conditioning)

    denoiser.network, denoiser.output = network, output  # type: ignore[method-assign]
    return denoiser


@pytest.mark.parametrize(("schedule", "prediction"), [(Flow(), "flow"), (cosine(), "v"), (linear(), "eps")])
def test_optimal_denoiser_of_a_gaussian_has_the_same_error_on_every_schedule(
    schedule: Schedule, prediction: str
) -> None:
    found = noise_loss(ideal(schedule, prediction), batches(16, 16))
    assert found.levels == LEVELS
    expected = 1 / (1 + torch.tensor(found.levels).exp())  # sigma² / (alpha² + sigma²)
    torch.testing.assert_close(torch.tensor(found.means), expected, rtol=0.1, atol=0)
    reference = noise_loss(ideal(Flow(), "flow"), batches(32))
    torch.testing.assert_close(found.errors, reference.errors, rtol=1e-3, atol=1e-5)


def test_errors_do_not_depend_on_the_batch_size() -> None:
    denoiser = ideal(Flow(), "flow")
    torch.testing.assert_close(
        noise_loss(denoiser, batches(8)).errors, noise_loss(denoiser, batches(3, 5)).errors, rtol=1e-5, atol=1e-7
    )


def test_noise_levels_outside_the_schedules_range_are_left_out() -> None:
    assert noise_loss(ideal(linear(), "eps"), batches(2), levels=(50.0, 0.0, -50.0)).levels == (0.0,)
    with pytest.raises(ValueError, match="includes none"):
        noise_loss(ideal(linear(), "eps"), batches(2), levels=(50.0,))


def test_a_single_validation_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two validation samples"):
        noise_loss(ideal(Flow(), "flow"), batches(1))


@pytest.mark.parametrize(("wanted", "available", "count"), [(0, 1, 0), (128, 5, 5), (3, 5, 3), (128, 0, 0)])
def test_at_most_the_available_samples_are_measured(wanted: int, available: int, count: int) -> None:
    assert sample_count(wanted, available) == count


def test_the_loss_of_a_single_held_out_sample_is_skipped_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="is skipped: it needs at least 2 validation samples, not 1"):
        assert sample_count(128, 1) == 0
