"""The noise levels at which a pipeline samples."""

from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.grid import Grid
from ldm.sampling.spacing import get_spacing


def sampling_grid(pipeline: Pipeline, steps: int | None = None) -> Grid:
    """Returns the sampling grid of the pipeline's settings, or of another number of steps."""
    schedule, settings = pipeline.denoiser.schedule, pipeline.settings
    times = get_spacing(settings.spacing, settings.spacing_options)(
        schedule, settings.steps if steps is None else steps
    )
    return Grid.of(schedule, times)
