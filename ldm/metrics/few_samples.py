"""Warns about metrics that were measured on too few images, according to their provenance."""

from typing import Any

from ldm.metrics.provenance import must_agree
from ldm.metrics.sample_sizes import MIN_IMAGES


def image_count(metric: str, provenance: dict[str, Any]) -> int | None:
    """Returns the number of generated or reference images that a metric was measured on, whichever is smaller.

    Returns None if the metric does not use images or the number is not recorded.
    """
    if metric.startswith("val/"):
        counts = [_count(provenance.get("sets"), metric.split("/")[1])]
    else:
        keys = {key.partition(".")[0] for key in must_agree(metric)}
        counts = [_count(provenance, part) for part in ("prompts", "reference", "validation") if part in keys]
    return min((count for count in counts if count is not None), default=None)


def _count(about: dict[str, Any] | None, part: str) -> int | None:
    entry = (about or {}).get(part)
    return entry.get("count") if isinstance(entry, dict) else None


def few_samples(metric: str, provenance: dict[str, Any]) -> str | None:
    """Returns a warning if a metric was measured on too few images, to be shown beside its value."""
    count = image_count(metric, provenance)
    if count is None:
        return None
    if metric in ("fid", "fid_infinity") and (width := provenance.get("feature_width")) and count <= width:
        return biased(_count(provenance, "reference") or count, _count(provenance, "prompts") or count, width)
    if count < MIN_IMAGES:
        return f"measured on {count} images, fewer than the {MIN_IMAGES} that a comparison needs"
    return None


def biased(real: int, generated: int, width: int) -> str:
    """Returns the warning for an FID with at most as many real or generated images as features, `width`."""
    return (
        f"FID from {real} real and {generated} generated images is strongly biased, because there are {width} features"
        ": compare it only with values from the same counts"
    )
