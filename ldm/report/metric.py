"""Names and formats the metrics of runs, and chooses those that a comparison lists."""

import math
from dataclasses import dataclass

from ldm.report.runs import Run


@dataclass(frozen=True)
class Metric:
    """Name and format of a metric; `better` is +1 if higher is better, -1 if lower is better, 0 if neither."""

    key: str
    title: str
    better: int
    percent: bool = False
    headline: bool = True

    @property
    def main(self) -> bool:
        """Whether the metric is of generated images or of the validation, and can be ranked."""
        return self.headline or (self.key.startswith("val/") and self.better != 0)

    def write(self, value: float, half: float | None = None) -> str:
        """Formats a value; its error, if given, determines the number of digits."""
        return self._write(value, half, " %")

    def write_difference(self, value: float, half: float | None = None) -> str:
        return self._write(abs(value), half, " points")

    def _write(self, value: float, half: float | None, unit: str) -> str:
        factor, unit = (100, unit) if self.percent else (1, "")
        value, digits = factor * value, ".1f" if self.percent else ".4g"
        if not half:
            return f"{value:{digits}}{unit}"
        places = max(0, 1 - math.floor(math.log10(factor * half)))
        return f"{value:.{places}f} ± {factor * half:.{places}f}{unit}"


ARROWS = {1: " ↑", -1: " ↓", 0: ""}  # which values are better

KNOWN = [
    Metric("accuracy", "accuracy", 1, percent=True),
    Metric("fid", "FID", -1),
    Metric("fid_infinity", "FID∞", -1),
    Metric("kid", "KID", -1),
    Metric("precision", "precision", 1, percent=True),
    Metric("recall", "recall", 1, percent=True),
    Metric("clip_score", "CLIP score", 1),
    Metric("inception_score", "Inception score", 1),
    Metric("noise_loss", "x0 error over noise levels", -1),
    Metric("fid_error", "FID bootstrap error", 0, headline=False),
    Metric("kid_error", "KID bootstrap error", 0, headline=False),
    Metric("sampling_seconds", "sampling time in seconds", -1, headline=False),
    Metric("nfe", "network calls per image", -1, headline=False),
    Metric("training_seconds", "training time in seconds", -1, headline=False),
    Metric("images_per_second", "training images per second", 1, headline=False),
]
VALIDATION = {  # by the last part of val/SET/NAME: title, +1 if higher is better, and whether it is a share
    "loss": ("loss", -1, False),
    "psnr": ("PSNR", 1, False),
    "picture_found": ("image retrieval accuracy", 1, True),
    "caption_found": ("caption retrieval accuracy", 1, True),
}


def is_evaluation(metric: str) -> bool:
    """Whether a metric is of generated images or, for the first stage and CLIP, of the validation, beyond the loss."""
    leaf = metric.rpartition("/")[2] if metric.startswith("val/") else ""
    of_images = {known.key for known in KNOWN if known.headline}
    return metric in of_images or (leaf in VALIDATION and leaf != "loss")


def metrics_of(groups: list[list[Run]]) -> list[Metric]:
    """Returns the metrics that any run has: known metrics in their order, parts of accuracy, validation, then others.

    Validation metrics are headline metrics if no two groups share a headline metric of generated images.
    """
    names = dict.fromkeys(name for runs in groups for run in runs for name in run.metrics)
    known = [metric for metric in KNOWN if metric.key in names]
    parts = [
        Metric(name, f"accuracy: {name.removeprefix('accuracy_')}", 1, percent=True, headline=False)
        for name in names
        if name.startswith("accuracy_")
    ]
    headline = not any(_is_shared(metric, groups) for metric in known if metric.headline)
    validation = [_validation(name, headline) for name in names if name.startswith("val/") and name.count("/") > 1]
    listed = {metric.key for metric in [*known, *parts, *validation]}
    others = (Metric(name, name, 0, headline=False) for name in names if name not in listed)
    return [*known, *parts, *validation, *others]


def _is_shared(metric: Metric, groups: list[list[Run]]) -> bool:
    return sum(any(metric.key in run.metrics for run in runs) for runs in groups) > 1


def _validation(name: str, headline: bool) -> Metric:
    _, data, leaf = name.split("/", 2)
    title, better, percent = VALIDATION.get(leaf, (leaf.replace("_", " "), 0, False))
    return Metric(name, f"validation {title} on {data}", better, percent, headline and better != 0)
