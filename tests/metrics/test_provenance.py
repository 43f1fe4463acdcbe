import copy
from typing import Any

import pytest
import torch

from ldm.metrics.provenance import Provenance, add_hashes, image_hash, incomparable, text_hash

PROVENANCE: dict[str, Any] = {
    "feature_network": {"network": "ImageTower", "fingerprint": "a" * 64, "resize": "bicubic", "size": 64},
    "reference": {"data": "Shapes", "count": 2048, "sha256": "b" * 64},
    "prompts": {"count": 512, "sha256": "c" * 64, "seeds": [0, 511]},
    "sampling": {"sampler": "ddim", "steps": 20, "guidance": 2.0},
    "size": [64, 64],
    "device": "cpu",
    "torch": "2.13",
    "dtype": "32-true",
}


SETS = {"count": 256, "sha256": "e" * 64, "weighting": {"name": "min_snr", "gamma": 5.0}, "huber": None}


def validated(**values: Any) -> dict[str, Any]:
    return PROVENANCE | {"sets": {"shapes": SETS | values, "photos": {"count": 1}}}


def changed(part: str, **values: Any) -> dict[str, Any]:
    other = copy.deepcopy(PROVENANCE)
    other[part] |= values
    return other


@pytest.mark.parametrize(
    ("metric", "other", "reason"),
    [
        ("fid", changed("feature_network", resize="bilinear"), "feature networks differ (ImageTower"),
        ("fid", changed("reference", sha256="d" * 64), "reference images differ (bbbbbbbbbbbb and dddddddddddd)"),
        ("fid_infinity", changed("prompts", count=100), "numbers of generated images differ (512 and 100)"),
        ("accuracy_shape", changed("prompts", sha256="d" * 64), "prompts differ"),
        ("precision", {**PROVENANCE, "size": [32, 32]}, "image sizes differ ([64, 64] and [32, 32])"),
        ("images_per_second", {**PROVENANCE, "device": "GPU"}, "devices differ (cpu and GPU)"),
        ("recall", {**PROVENANCE, "reference": {}}, "reference images differ (bbbbbbbbbbbb and not recorded)"),
        ("new_metric", changed("reference", sha256="d" * 64), "reference images differ"),
    ],
)
def test_values_measured_differently_are_incomparable(metric: str, other: dict[str, Any], reason: str) -> None:
    assert reason in "; ".join(incomparable(metric, PROVENANCE, other))


@pytest.mark.parametrize(
    ("metric", "other"),
    [
        ("fid", changed("sampling", steps=50, sampler="euler")),
        ("accuracy", changed("reference", sha256="d" * 64)),
        ("fid", {**PROVENANCE, "device": "GPU", "steps": 9}),
        ("images_per_second", changed("reference", sha256="d" * 64)),
    ],
)
def test_settings_under_comparison_may_differ(metric: str, other: dict[str, Any]) -> None:
    assert incomparable(metric, PROVENANCE, other) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"count": 9}, "validations on shapes differ in count (256 and 9)"),
        ({"sha256": "d" * 64}, "validations on shapes differ in sha256 (eeeeeeeeeeee and dddddddddddd)"),
        ({"weighting": {"name": "min_snr", "gamma": 4.0}}, "differ in weighting (min_snr 5.0 and min_snr 4.0)"),
        ({"huber": 0.1}, "differ in huber (not recorded and 0.1)"),
    ],
)
def test_validation_losses_need_the_same_data_and_the_same_objective(changes: dict[str, Any], reason: str) -> None:
    (message,) = incomparable("val/shapes/loss", validated(), validated(**changes))
    assert reason in message
    assert incomparable("val/photos/loss", validated(), validated(**changes)) == []


def test_validations_are_incomparable_if_only_one_records_what_it_measured() -> None:
    (message,) = incomparable("val/shapes/loss", validated(), PROVENANCE)
    assert message == "only one of them records what the validation on shapes measured"


def test_swapping_captions_changes_the_hash_of_captioned_images() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(2, 3, 1, 1)
    both = image_hash(images, ["red", "blue"])
    assert both == add_hashes(image_hash(images[1:], ["blue"]), image_hash(images[:1], ["red"]))
    assert len({both, image_hash(images, ["blue", "red"]), image_hash(images)}) == 3


def test_hash_of_images_is_the_sum_of_its_parts_in_any_order() -> None:
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert image_hash(images) == add_hashes(image_hash(images[3:]), image_hash(images[:3]))
    assert image_hash(images) != image_hash(images[:4])
    assert image_hash(images) != image_hash(images.transpose(2, 3))
    assert image_hash(torch.zeros(1, 3, 2, 8, dtype=torch.uint8)) != image_hash(
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    )


def test_hash_of_captions_depends_on_where_they_are_split() -> None:
    assert text_hash(["a b", "c"]) != text_hash(["a", "b c"])


def test_provenance_is_plain_data_and_keeps_the_key_of_older_runs() -> None:
    parts = {name: {} for name in ("reference", "prompts", "sampling")}
    plain = Provenance(
        **parts, feature_network={"fingerprint": "f"}, size=[8, 8], ema=None, steps=1, seed=0, ranks=1,
        dtype="32-true", device="cpu", finished="today",
    ).plain()  # fmt: skip
    assert plain["features"] == "f" and plain["torch"] == torch.__version__
    assert incomparable("fid", plain, plain) == []
