"""Latent diffusion from the ground up."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline as Pipeline


def __getattr__(name: str) -> Any:
    """`ldm.Pipeline`, imported when it is asked for: torch takes seconds, which `ldm info` need not wait."""
    if name == "Pipeline":
        from ldm.pipeline.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
