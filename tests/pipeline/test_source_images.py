import pytest
import torch
from PIL import Image

from ldm.diffusion.schedule import Flow, Schedule, scaled_linear
from ldm.image import to_pil
from ldm.pipeline.source_images import fit_image, fit_mask, keep_unmasked, latent_mask, paste, step_counts
from ldm.sampling.driver import SAMPLERS, sample
from ldm.sampling.grid import Grid

NOISE = torch.randn(200, 2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EPS, X0 = NOISE[198], NOISE[199]
REPAINT = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
REPAINT[0, :, :, 3:] = REPAINT[1, :, 2:4] = True


def random_image(height: int, width: int) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    return to_pil(torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8))[0]


@pytest.mark.parametrize("schedule, first", [(Flow(), 1.0), (Flow(), 0.6), (scaled_linear(), 700.0)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_solver_leaves_unmasked_latents_unchanged(sampler: str, schedule: Schedule, first: float) -> None:
    grid = Grid.of(schedule, first * torch.tensor([1.0, 0.8, 0.55, 0.3, 0.1], dtype=torch.float64))
    denoise = keep_unmasked(lambda x, t: torch.tanh(x) * 0.7, X0, REPAINT)
    end = sample(SAMPLERS[sampler], denoise, grid.start(EPS, X0), grid, lambda draw: NOISE[draw])
    kept = ~REPAINT.expand_as(X0)
    torch.testing.assert_close(end[kept], X0[kept], rtol=1e-6, atol=1e-6)
    assert (end - X0)[~kept].abs().mean() > 0.1


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp_2m", "dpmpp_3m", "unipc", "deis", "lms"])
def test_unmasked_latents_keep_their_noise_at_every_step(sampler: str) -> None:
    """Solvers without added noise pass through alpha·x0 + sigma·eps, to which latent blending would reset them."""
    grid = Grid.of(Flow(), torch.linspace(0.8, 0.1, 8, dtype=torch.float64))
    denoise = keep_unmasked(lambda x, t: torch.tanh(x), X0, REPAINT)
    kept = ~REPAINT.expand_as(X0)
    states = list(SAMPLERS[sampler](denoise, grid.start(EPS, X0), grid, lambda draw: EPS))
    for state, point in zip(states, grid.points[1:], strict=True):
        torch.testing.assert_close(state.x[kept], (point.alpha * X0 + point.sigma * EPS)[kept], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps, strength, run", [(20, 1.0, 20), (20, 0.5, 10), (50, 0.75, 37), (3, 0.34, 1)])
def test_strength_is_the_share_of_the_steps_rounded_down(steps: int, strength: float, run: int) -> None:
    assert step_counts(steps, strength) == (steps, run)


@pytest.mark.parametrize("strength", [0.0, 1.01, -0.5, float("nan")])
def test_a_strength_outside_0_to_1_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        step_counts(20, strength)


def test_a_strength_of_less_than_one_step_is_refused_with_the_minimum() -> None:
    with pytest.raises(
        ValueError, match=r"strength=0\.04 of 20 steps is less than one step: use a strength above 1/20"
    ):
        step_counts(20, 0.04)
    assert step_counts(20, 0.05) == (20, 1)


def test_an_image_of_the_right_size_is_unchanged() -> None:
    image = random_image(8, 12)
    assert torch.equal(fit_image(image, (8, 12)), torch.tensor(list(image.tobytes())).view(8, 12, 3).permute(2, 0, 1))


def test_a_mask_is_resized_like_its_image() -> None:
    """An image that equals its mask still does after both are scaled and cropped."""
    mask = Image.new("L", (80, 40))
    mask.paste(255, (40, 12, 80, 28))
    share = fit_mask(mask, mask.convert("RGB"), (8, 8))
    assert torch.equal(share.expand(3, -1, -1), fit_image(mask.convert("RGB"), (8, 8)).float() / 255)
    coarse = fit_mask(mask.resize((40, 20), Image.Resampling.NEAREST), mask.convert("RGB"), (8, 8))
    assert coarse.shape == (1, 8, 8) and (coarse - share).abs().mean() < 0.05


def test_a_latent_is_repainted_if_any_of_its_pixels_is() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 3, 4], mask[..., 7, 0] = 1.0, 0.4  # below half is not repainted
    assert latent_mask(mask, 4).flatten().tolist() == [False, True, False, False]


def test_paste_blends_by_the_mask() -> None:
    generated, original = (
        torch.full((1, 3, 1, 3), 200, dtype=torch.uint8),
        torch.full((1, 3, 1, 3), 100, dtype=torch.uint8),
    )
    blended = paste(generated, original, torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3))
    assert blended.dtype == torch.uint8 and blended[0, 0, 0].tolist() == [100, 150, 200]
