"""Latent diffusion models: training, sampling and evaluation."""

from typing import TYPE_CHECKING, Any

__all__ = ["Pipeline"]

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline as Pipeline


def __getattr__(name: str) -> Any:
    """Imports `ldm.Pipeline` on first use, because importing torch takes seconds that `ldm info` does not need."""
    if name == "Pipeline":
        from ldm.pipeline.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists `Pipeline` before its first use, too, so that completion finds it."""
    return sorted({*globals(), *__all__})
