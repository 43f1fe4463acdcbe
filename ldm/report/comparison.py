"""Compares groups of runs: means, differences with p-values, and the conclusions that these support."""

import math
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Any

from ldm.metrics.provenance import incomparable
from ldm.report.groups import Difference, Group, group_runs
from ldm.report.runs import Run
from ldm.report.statistics import LEVEL, Contrast, Mean, contrast, holm, mean


@dataclass(frozen=True)
class Metric:
    """How a metric is named and formatted; `better` is +1 if higher is better, -1 if lower is, 0 if neither."""

    key: str
    title: str
    better: int
    percent: bool = False
    headline: bool = True

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


@dataclass(frozen=True)
class GroupPair:
    """Two groups by position, the better one first; `reasons` says why they cannot be compared, if they cannot."""

    metric: Metric
    a: int
    b: int
    contrast: Contrast | None
    p: float | None  # adjusted for the pairs of this metric
    reasons: list[str]

    @property
    def is_insignificant(self) -> bool:
        """Whether a test was possible and showed no difference."""
        return self.p is not None and self.p >= LEVEL


@dataclass(frozen=True)
class Comparison:
    runs: list[Run]
    groups: list[Group]
    differences: list[Difference]
    metrics: list[Metric]
    means: dict[str, list[Mean | None]]  # by metric, one per group
    not_comparable: dict[str, list[list[str]]]  # by metric: why a group's value is not comparable with the first's
    pairs: list[GroupPair]

    @property
    def sentences(self) -> list[str]:
        """Conclusions on the best group against each other one, by headline metric; significant differences first."""
        chosen = [pair for pair in self.pairs if pair.metric.headline and self._has_best(pair)]
        significant = [sentence(pair, self.groups) for pair in chosen if not pair.is_insignificant]
        insignificant = groupby((pair for pair in chosen if pair.is_insignificant), lambda pair: pair.metric)
        return significant + [no_difference_sentence(list(pairs), self.groups) for _, pairs in insignificant]

    def _has_best(self, pair: GroupPair) -> bool:
        """Whether the pair includes the best group among those that are comparable with the first.

        Groups with a single seed are not the best if any group has more.
        """
        means, reasons = self.means[pair.metric.key], self.not_comparable[pair.metric.key]
        ranked = [
            (mean.count > 1, pair.metric.better * mean.value, -i)
            for i, mean in enumerate(means)
            if mean is not None and not reasons[i]
        ]
        return bool(ranked) and -max(ranked)[2] in (pair.a, pair.b)


def compare(runs: list[Run]) -> Comparison:
    """Compares runs by groups and pairs of groups. Raises ValueError if no run has anything to compare."""
    comparison = means_of(runs)
    pairs = [pair for metric in comparison.metrics if metric.better for pair in _pairs(metric, comparison.groups)]
    return replace(comparison, pairs=pairs)


def means_of(runs: list[Run]) -> Comparison:
    """Compares runs by groups only, because many groups have very many pairs."""
    groups, differences = group_runs(runs)
    if not groups:
        raise ValueError(
            "none of these folders contains a run: "
            + "; ".join(f"{run.path} ({run.note or run.state})" for run in runs)
        )
    metrics = metrics_of([group.runs for group in groups])
    means = {m.key: [mean(list(v.values())) if (v := g.values(m.key)) else None for g in groups] for m in metrics}
    not_comparable = {metric.key: _not_comparable(metric, groups) for metric in metrics}
    return Comparison(runs, groups, differences, metrics, means, not_comparable, [])


def metrics_of(groups: list[list[Run]]) -> list[Metric]:
    """Returns the metrics that any run has: known ones in their order, parts of accuracy, validation, then others.

    Validation metrics are the headline if no two groups share a headline metric of generated images.
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


def _against(metric: str, runs: list[Run], first: Run) -> list[str]:
    reasons = (reason for run in runs for reason in incomparable(metric, first.provenance, run.provenance))
    return list(dict.fromkeys(reasons))


def _measured(metric: str, group: Group) -> list[Run]:
    return [run for run in group.runs if metric in run.metrics]


def _not_comparable(metric: Metric, groups: list[Group]) -> list[list[str]]:
    measured = [_measured(metric.key, group) for group in groups]
    first = next(runs[0] for runs in measured if runs)
    return [_against(metric.key, runs, first) for runs in measured]


def _pairs(metric: Metric, groups: list[Group]) -> list[GroupPair]:
    pairs = []
    for a, b in combinations(range(len(groups)), 2):
        runs = [*_measured(metric.key, groups[a]), *_measured(metric.key, groups[b])]
        values = groups[a].values(metric.key), groups[b].values(metric.key)
        if not all(values):
            continue
        if reasons := _against(metric.key, runs, runs[0]):
            pairs.append(GroupPair(metric, a, b, None, None, reasons))
            continue
        result = contrast(*values)
        if result.difference * metric.better < 0:
            a, b, result = b, a, contrast(*reversed(values))
        pairs.append(GroupPair(metric, a, b, result, result.p, []))
    adjusted = iter(holm([pair.p for pair in pairs if pair.p is not None]))
    return [replace(pair, p=next(adjusted)) if pair.p is not None else pair for pair in pairs]


def sentence(pair: GroupPair, groups: list[Group]) -> str:
    """States what the comparison of a pair shows."""
    a, b, title = groups[pair.a].name, groups[pair.b].name, pair.metric.title
    if pair.contrast is None:
        return f"{title} of {a} and of {b} cannot be compared: {'; '.join(pair.reasons)}."
    by = pair.metric.write_difference(pair.contrast.difference, pair.contrast.half)
    if pair.contrast.half is None or pair.p is None:
        return f"{title}: {a} is better than {b} by {by}, but one seed is too few to test the difference."
    if pair.is_insignificant:
        return f"{title}: no difference shown between {a} and {b} ({by}, {_how(pair)})."
    return f"{a} beats {b} by {by} {title}, {_how(pair)}."


def no_difference_sentence(pairs: list[GroupPair], groups: list[Group]) -> str:
    """States in one sentence that no pair of a metric with its best group shows a difference."""
    if len(pairs) == 1:
        return sentence(pairs[0], groups)
    (best,) = set.intersection(*({pair.a, pair.b} for pair in pairs))
    others = ", ".join(groups[pair.a + pair.b - best].name for pair in pairs)
    least = min(pair.p for pair in pairs if pair.p is not None)
    title, name = pairs[0].metric.title, groups[best].name
    return f"{title}: no difference shown between {name}, the best, and {others} (p from {least:.2g} up)."


def _how(pair: GroupPair) -> str:
    assert pair.contrast is not None and pair.p is not None
    seeds = f"{pair.contrast.count} seeds" + ("" if pair.contrast.paired else " per group, unpaired")
    return f"{seeds}, p = {pair.p:.2g}" if pair.p >= 1e-4 else f"{seeds}, p < 0.0001"


def plain(comparison: Comparison) -> dict[str, Any]:
    """Returns the contents of report.json."""
    groups, means, reasons = comparison.groups, comparison.means, comparison.not_comparable
    return {
        "sentences": comparison.sentences,
        "groups": [
            {
                "name": group.name,
                "runs": [str(run.path) for run in group.runs],
                "seeds": [run.seed for run in group.runs],
                "settings": {d.key: d.values[i] for d in comparison.differences},
                "metrics": {
                    key: {"mean": m.value, "half_interval": m.half, "count": m.count, "not_comparable": reasons[key][i]}
                    for key in means
                    if (m := means[key][i]) is not None
                },
            }
            for i, group in enumerate(groups)
        ],
        "pairs": [
            {
                "metric": pair.metric.key,
                "a": groups[pair.a].name,
                "b": groups[pair.b].name,
                "difference": pair.contrast and pair.contrast.difference,
                "half_interval": pair.contrast and pair.contrast.half,
                "p_adjusted": pair.p,
                "seeds": pair.contrast and pair.contrast.count,
                "paired": pair.contrast and pair.contrast.paired,
                "not_comparable": pair.reasons,
            }
            for pair in comparison.pairs
        ],
        "runs": [
            {
                "path": str(run.path),
                "state": run.state,
                "note": run.note,
                "seed": run.seed,
                "metrics": run.metrics,
                "provenance": run.provenance,
            }
            for run in comparison.runs
        ],
    }
