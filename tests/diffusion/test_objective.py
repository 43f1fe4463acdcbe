"""The random times and noise of the training loss, and its settings."""

import math

import pytest
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.random import normal
from tests.training.tiny import batch, diffusion


def test_stratified_times_depend_on_the_sample_and_its_stratum_only() -> None:
    even = diffusion(stratified=True)
    images = batch(0, 1, 2, 3)
    strata = torch.tensor([[6, 8], [0, 8], [3, 8], [5, 8]])
    t, _ = even.losses({**images, "stratum": strata})
    plain, _ = diffusion().losses({**images, "stratum": strata})
    torch.testing.assert_close(t, (strata[:, 0] + plain) / 8)  # Uniform(Flow()) returns the uniform numbers unchanged
    assert torch.equal(even.losses(images)[0], plain)  # validation has no strata


def test_offset_noise_adds_a_constant_per_sample_and_channel() -> None:
    seen: list[Tensor] = []
    for offset in (0.0, 0.3):
        module = diffusion(offset_noise=offset)
        module.denoiser = Denoiser(lambda x, *_: seen.append(x) or x, module.schedule, module.prediction)
        t, _ = module.losses(batch(0, 1))
    added = (seen[1] - seen[0]) / t.view(-1, 1, 1, 1)  # sigma is t
    expected = 0.3 * normal(0, "offset noise", torch.arange(2), torch.zeros(2).long(), (4, 1, 1))
    torch.testing.assert_close(added, expected.expand_as(added).to(added.dtype), rtol=1e-4, atol=1e-5)


def test_huber_reduces_the_loss_of_large_errors_only() -> None:
    plain, strict, loose = (diffusion(huber=huber).losses(batch(0, 1, 2))[1].detach() for huber in (None, 0.01, 1e6))
    torch.testing.assert_close(loose, plain)
    assert (strict < plain / 5).all()


@pytest.mark.parametrize(
    "how", [{"offset_noise": -0.1}, {"offset_noise": math.nan}, {"huber": 0.0}, {"huber": -1.0}, {"huber": math.nan}]
)
def test_invalid_loss_settings_are_refused(how: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(how))):
        diffusion(**how)
