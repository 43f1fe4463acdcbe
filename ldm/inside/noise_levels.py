"""The noise levels that a pipeline walks along."""

from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.grid import Grid
from ldm.sampling.spacing import get_spacing


def sampling_grid(pipeline: Pipeline, steps: int | None = None) -> Grid:
    """Those of its settings, or of so many steps."""
    schedule, settings = pipeline.denoiser.schedule, pipeline.settings
    times = get_spacing(settings.spacing, settings.spacing_options)(
        schedule, settings.steps if steps is None else steps
    )
    return Grid.of(schedule, times)
