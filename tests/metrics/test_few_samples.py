"""Metrics that were measured on few images have a warning."""

from typing import Any

import pytest

from ldm.metrics.few_samples import few_samples, image_count
from ldm.metrics.measure import report

ABOUT: dict[str, Any] = {
    "prompts": {"count": 300},
    "reference": {"count": 90},
    "validation": {"count": 128},
    "sets": {"shapes": {"count": 7}},
    "feature_width": 64,
}


@pytest.mark.parametrize(
    ("metric", "count"),
    [
        ("fid", 90),
        ("kid", 90),
        ("clip_score", 300),
        ("accuracy_shape", 300),
        ("noise_loss", 128),
        ("val/shapes/loss", 7),
        ("val/other/loss", None),
        ("training_seconds", None),
        ("nfe", None),
    ],
)
def test_a_metric_counts_the_images_that_it_is_measured_on(metric: str, count: int | None) -> None:
    assert image_count(metric, ABOUT) == count
    assert image_count(metric, {}) is None


def test_the_warnings_are_stored_beside_the_metrics() -> None:
    metrics = dict.fromkeys(("fid", "clip_score", "val/shapes/loss", "nfe"), 1.0)
    assert report(metrics, ABOUT, None)["warnings"].keys() == {"fid", "val/shapes/loss"}
    assert report(metrics, ABOUT | {"sets": None, "reference": {"count": 100}}, None)["warnings"] == {}


def test_the_bias_of_fid_is_the_more_important_warning() -> None:
    assert "90 real and 300 generated images is strongly biased" in str(
        few_samples("fid", ABOUT | {"feature_width": 90})
    )
    assert few_samples("fid", ABOUT) == "measured on 90 images, fewer than the 100 that a comparison needs"
