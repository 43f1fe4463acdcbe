import pytest
import torch

from ldm.image import pixels, to_pil, to_uint8
from ldm.inside.film_strip import film_strip, x0_by_step
from ldm.pipeline.pipeline import Pipeline
from tests.tiny import SAMPLING, save_tiny_model


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.load(str(save_tiny_model(tmp_path_factory.mktemp("model"))), device="cpu")


def test_there_is_one_estimate_per_step_and_the_last_is_the_image(pipeline):
    estimates = x0_by_step(pipeline, "a red circle", seed=3)
    assert estimates.shape == (SAMPLING["steps"], 4, 8, 8)
    image = to_uint8(pipeline.first_stage.decode(estimates[-1:]))
    assert torch.equal(image, pipeline("a red circle", seeds=3).images)


def test_the_first_estimate_is_the_image_of_one_step_sampling(pipeline):
    image = to_uint8(pipeline.first_stage.decode(x0_by_step(pipeline, "a red circle", seed=3)[:1]))
    assert torch.equal(image, pipeline("a red circle", seeds=3, steps=1).images)


@pytest.mark.parametrize("frames, shown", [(2, [0, 2]), (3, [0, 1, 2]), (10, [0, 1, 2])])
def test_the_strip_shows_the_first_and_the_last_estimate_at_any_length(pipeline, frames, shown):
    estimates = to_pil(pipeline.first_stage.decode(x0_by_step(pipeline, "a red circle")[shown]))
    strip = film_strip(pipeline, "a red circle", frames=frames)
    factor, gap = 12, 8  # in ldm.image.grid, which enlarges 16 pixels to 192
    assert strip.width == gap + len(shown) * (192 + gap)
    for column, estimate in enumerate(estimates):
        cell = strip.crop((gap + column * (192 + gap), gap, (column + 1) * (192 + gap), gap + 192))
        assert torch.equal(pixels(cell)[:, ::factor, ::factor], pixels(estimate))


def test_a_strip_of_one_frame_is_refused(pipeline):
    with pytest.raises(ValueError, match="frames is 1, but must be 2 or more"):
        film_strip(pipeline, "a red circle", frames=1)
