import math

import pytest
import torch

from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.image import to_pil
from ldm.inside.inversion import ddim_inversion, invert, sample_from_noise
from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.driver import sample
from ldm.sampling.grid import Grid
from ldm.sampling.one_step import ddim
from ldm.sampling.spacing import trailing
from tests.closed_form import gaussian, log_snr_grid, mixture, schedule_name, states
from tests.tiny import save_tiny_model

IMAGE = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.load(str(save_tiny_model(tmp_path_factory.mktemp("model"))), device="cpu")


def round_trip_error(schedule, steps, refinements):
    grid, denoise, x = log_snr_grid(schedule, steps), mixture(schedule), states()
    reconstructed = sample(ddim, denoise, invert(denoise, x, grid, refinements), grid)
    return float((reconstructed - x).square().mean().sqrt())


@pytest.mark.parametrize("schedule", [scaled_linear(), Flow()], ids=schedule_name)
@pytest.mark.parametrize("refinements", [0, 1, 2])
def test_each_refinement_raises_the_order_of_the_round_trip_error_by_one(schedule, refinements):
    errors = [round_trip_error(schedule, steps, refinements) for steps in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1 + refinements, abs=0.15)


@pytest.mark.parametrize("schedule", [scaled_linear(), Flow()], ids=schedule_name)
def test_many_refinements_make_the_round_trip_from_the_clean_end_exact(schedule):
    grid, denoise, x = Grid.of(schedule, trailing(schedule, 10)), gaussian(schedule, 0.3, 0.5), states()
    reconstructed = sample(ddim, denoise, invert(denoise, x, grid, refinements=100), grid)
    torch.testing.assert_close(reconstructed, x)


def test_the_inversion_of_gaussian_data_converges_to_the_closed_form():
    """(x - alpha·mean) / sqrt(alpha²·std² + sigma²) is constant along the exact path."""
    schedule, mean, std, x0 = Flow(), 0.3, 0.5, states()
    errors = []
    for steps in (200, 400):
        noise = invert(gaussian(schedule, mean, std), x0, Grid.of(schedule, trailing(schedule, steps)))
        errors.append(float((noise - (x0 - mean) / std).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2) and errors[1] < 0.02


def test_a_negative_number_of_refinements_is_refused():
    with pytest.raises(ValueError, match="refinements is -1, but must be 0 or more"):
        invert(gaussian(Flow(), 0.0, 1.0), states(), log_snr_grid(Flow(), 4), refinements=-1)


def test_an_exact_inversion_is_limited_by_the_first_stage_only(pipeline):
    """With few steps the inversion is inexact without refinements, and exact with many."""
    rough, exact = (ddim_inversion(pipeline, IMAGE, "a red circle", 4, refinements) for refinements in (0, 60))
    assert exact.noise.shape == (1, 4, 8, 8) and exact.reconstruction.shape == IMAGE.shape
    assert exact.psnr == pytest.approx(exact.first_stage_psnr, abs=0.05)
    assert torch.equal(exact.original, IMAGE)
    assert not torch.equal(rough.reconstruction, exact.reconstruction)


def test_the_reconstruction_is_the_image_that_ddim_generates_from_the_noise(pipeline):
    inversion = ddim_inversion(pipeline, to_pil(IMAGE)[0], "a red circle", steps=3)
    same, other = (
        sample_from_noise(pipeline, inversion.noise, prompt, steps=3) for prompt in ("a red circle", "a blue square")
    )
    assert torch.equal(same, inversion.reconstruction) and not torch.equal(other, inversion.reconstruction)
    error = (inversion.reconstruction.double() - IMAGE.double()).square().mean()
    assert inversion.psnr == pytest.approx(20 * math.log10(255) - 10 * math.log10(error))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image": None}, "there is no image to invert"),
        ({"image": "picture.png"}, "must be a PIL image"),
        ({"steps": 0}, "steps is 0"),
        ({"prompt": 7}, "a prompt is 7, which is not text"),
        ({"refinements": -1}, "refinements is -1"),
    ],
)
def test_invalid_inputs_of_inversion_are_refused(pipeline, wrong, message):
    with pytest.raises(ValueError, match=message):
        ddim_inversion(pipeline, **{"image": IMAGE} | wrong)
