"""Measures generated images: one row of numbers per image, and the metrics of all rows together."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.sources.phrasing import parse
from ldm.metrics.clip_score import ClipScore, ClipSimilarity
from ldm.metrics.composition import PARTS, verdicts
from ldm.metrics.distances import distances
from ldm.metrics.features import Features
from ldm.metrics.few_samples import few_samples
from ldm.metrics.inception import CLASSES, Inception
from ldm.metrics.inception_score import InceptionScore
from ldm.metrics.noise_loss import NoiseLoss
from ldm.metrics.pair import check_features
from ldm.metrics.reference import Reference

NEIGHBOURS = 3  # of precision and recall

Rows = dict[str, Tensor]  # by quantity; one row per image


@dataclass(frozen=True)
class ImageMetrics:
    """The networks and settings that images are measured with.

    With `composition` the captions describe shapes, and each image is checked against its own. `resamples` and
    `infinity` are those of `distances`.
    """

    features: Features
    clip: ClipSimilarity | None = None
    composition: bool = False
    resamples: int = 0
    infinity: bool = False

    def to(self, device: torch.device) -> None:
        self.features.to(device)
        if self.clip is not None:
            self.clip.to(device)

    def rows(self, images: Tensor, captions: Sequence[str]) -> Rows:
        """Measures images uint8 (b, 3, h, w); the rows are on the CPU."""
        on_device = images.to(self.features.mean.device)
        rows = {"features": self.features(on_device).cpu()}
        check_features(rows["features"], real=False)
        if self.clip is not None:
            rows["cosines"] = self.clip(on_device, captions).cpu()
        if self.composition:
            rows["verdicts"] = verdicts(images, captions)
        return rows

    def compute(self, rows: Rows, captions: Sequence[str], size: Sequence[int], real: Reference) -> dict[str, float]:
        """Computes the metrics of all images, whose `size` is (height, width), against the real ones."""
        values = composition(rows["verdicts"], captions) if self.composition else {}
        values |= self._distances(rows["features"], size, real)
        if self.clip is not None:
            score = ClipScore(sync=False)
            score.update(rows["cosines"])
            values["clip_score"] = float(score.compute())
        return values

    def _distances(self, features: Tensor, size: Sequence[int], real: Reference) -> dict[str, float]:
        """Computes FID, KID, precision and recall in this process only: other ranks do not measure."""
        if min(len(features), len(real.ids)) <= NEIGHBOURS:
            warnings.warn(
                f"FID, KID, precision and recall are skipped: they need at least {NEIGHBOURS + 1} images on each side, "
                f"not {len(features)} generated and {len(real.ids)} real",
                stacklevel=3,
            )
            return {}
        if list(size) != real.about["size"]:
            warnings.warn(
                f"the generated images have size {list(size)}, the reference images {real.about['size']} (height, "
                "width in pixels): both are resized for the features, which affects FID, KID, precision and recall",
                stacklevel=3,
            )
        metrics = distances(self.features.num_features, NEIGHBOURS, self.resamples, self.infinity, sync=False)
        metrics.update(real.features, real=True, ids=real.ids)
        metrics.update(features, real=False, ids=torch.arange(len(features)))
        values = metrics.compute()
        if isinstance(self.features.network, Inception):
            score = InceptionScore(CLASSES, sync=False)
            for part in features.split(1024):
                score.update(self.features.network.logits(part.to(self.features.mean.device)).cpu())
            values["inception_score"] = score.compute()
        return {name: float(value) for name, value in values.items()}


def composition(found: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Computes accuracies from `verdicts`: overall, by attribute, and for prompts without and with an unseen pair.

    A pair is a colour and a shape; training images show none of the unseen ones.
    """
    shares = found.double().mean(dim=0).tolist()
    scores = {"accuracy": shares[0]} | {f"accuracy_{part}": s for part, s in zip(PARTS[1:], shares[1:], strict=True)}
    unseen = torch.tensor([parse(caption).is_unseen for caption in captions])
    for split, chosen in (("seen", ~unseen), ("unseen", unseen)):
        if chosen.any():
            scores[f"accuracy_{split}"] = found[chosen, 0].double().mean().item()
    return scores


@contextmanager
def counting(network: nn.Module) -> Iterator[list[int]]:
    """Yields a list whose only number counts the samples that the network processes, two for each guided sample."""
    calls = [0]

    def count(_: Any, _inputs: Any, out: Tensor) -> None:
        calls[0] += len(out)

    hook = network.register_forward_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


def report(metrics: dict[str, float], provenance: dict[str, Any], curve: NoiseLoss | None) -> dict[str, Any]:
    """Returns the contents of metrics.json; "warnings" names the metrics that were measured on too few images."""
    contents: dict[str, Any] = {"metrics": metrics, "provenance": provenance, "warnings": {}}
    if curve is not None:
        contents["metrics"] = metrics | {"noise_loss": sum(curve.means) / len(curve.means)}
        errors = {"mean": curve.means, "standard_error": curve.standard_errors}
        contents["curves"] = {"noise_loss": {"log_snr": list(curve.levels), **errors}}
    for name in contents["metrics"]:
        if warning := few_samples(name, provenance):
            contents["warnings"][name] = warning
    return contents
