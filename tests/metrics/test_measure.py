import numpy as np
import pytest
import torch
from torch import nn

from ldm.data.sources.phrasing import parse
from ldm.data.sources.shapes import held_out_prompts, place, render
from ldm.metrics.clip_score import ClipScore
from ldm.metrics.composition import PARTS, accuracy, verdicts
from ldm.metrics.fid import feature_fid
from ldm.metrics.measure import ImageMetrics, composition, counting, report
from ldm.metrics.noise_loss import NoiseLoss
from ldm.metrics.reference import Reference


class Means(nn.Module):
    """Replaces Features: its features are the channel means."""

    num_features, network = 3, None
    mean = torch.zeros(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


def random_images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def real(count: int) -> Reference:
    return Reference(Means()(random_images(count, 1)), torch.arange(count), {"size": [8, 8]})


def test_metrics_of_rows_from_several_batches_are_those_of_all_images() -> None:
    image_metrics, images, texts = ImageMetrics(Means()), random_images(10), ["x"] * 10  # type: ignore[arg-type]
    parts = [image_metrics.rows(images[:7], texts[:7]), image_metrics.rows(images[7:], texts[7:])]
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    found = image_metrics.compute(rows, texts, (8, 8), real(20))
    assert found["fid"] == pytest.approx(feature_fid(real(20).features, Means()(images)), rel=1e-9)
    assert found.keys() == {"fid", "kid", "precision", "recall"}


def test_clip_score_is_computed_from_the_cosines_of_the_rows() -> None:
    cosines = torch.tensor([0.2, -0.1, 0.5, 0.3])
    image_metrics = ImageMetrics(Means(), clip=lambda images, texts: cosines)  # type: ignore[arg-type]
    rows = image_metrics.rows(random_images(4), ["x"] * 4)
    score = ClipScore()
    score.update(cosines)
    assert image_metrics.compute(rows, ["x"] * 4, (8, 8), real(4))["clip_score"] == float(score.compute())


def test_features_that_are_not_finite_are_refused_when_they_are_computed() -> None:
    broken = ImageMetrics(lambda images: torch.full((len(images), 3), torch.nan))  # type: ignore[arg-type]
    broken.features.mean = torch.zeros(1)
    with pytest.raises(ValueError, match="2 of 2 generated images have features that are NaN"):
        broken.rows(random_images(2), ["x"] * 2)


def test_accuracy_is_reported_by_part_and_separately_for_unseen_pairs() -> None:
    captions = held_out_prompts(16)
    wrong = "a big red ring on a gray background"
    shown = [wrong if parse(caption).split == "unseen" else caption for caption in captions]
    scenes = [place(parse(caption), np.random.default_rng(i)) for i, caption in enumerate(shown)]
    rendered = [render(scene, parse(caption).background) for scene, caption in zip(scenes, shown, strict=True)]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in rendered])
    found = composition(verdicts(images, captions), captions)
    assert (found["accuracy_seen"], found["accuracy_unseen"]) == (1, 0)
    assert [found[name if name == "accuracy" else f"accuracy_{name}"] for name in PARTS] == pytest.approx(
        list(accuracy(images, captions).values())
    )


def test_network_calls_are_counted_per_sample_and_only_within_the_context() -> None:
    network = nn.Linear(2, 2)
    with counting(network) as calls:
        network(torch.zeros(3, 2))
        network(torch.zeros(1, 2))
    network(torch.zeros(5, 2))
    assert calls == [4]


def test_loss_by_noise_level_is_reported_as_a_metric_and_a_curve() -> None:
    curve = NoiseLoss((1.0, 0.0), torch.tensor([[1.0, 3.0], [2.0, 4.0]], dtype=torch.float64), seed=0)
    contents = report({"fid": 1.0}, {"seed": 3}, curve)
    assert contents["metrics"] == {"fid": 1.0, "noise_loss": 2.5} and contents["provenance"] == {"seed": 3}
    assert contents["curves"]["noise_loss"]["mean"] == [1.5, 3.5]
    assert "curves" not in report({"fid": 1.0}, {}, None)
