"""What runs show against one another: means, differences with p-values, and the sentences that these support."""

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
    """How a number is called and written; `better` is +1 where more is, -1 where less is, 0 where neither."""

    key: str
    title: str
    better: int
    percent: bool = False
    headline: bool = True

    def write(self, value: float, half: float | None = None) -> str:
        """With its error if it has one, which then decides how many digits are given."""
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
    Metric("fid_error", "FID's bootstrap error", 0, headline=False),
    Metric("kid_error", "KID's bootstrap error", 0, headline=False),
    Metric("sampling_seconds", "seconds of sampling", -1, headline=False),
    Metric("nfe", "network calls a picture", -1, headline=False),
    Metric("training_seconds", "seconds of training", -1, headline=False),
    Metric("images_per_second", "training images a second", 1, headline=False),
]


VALIDATION = {  # by the last part of val/SET/NAME: +1 where more is better, and whether it is a share
    "loss": (-1, False),
    "psnr": (1, False),
    "picture_found": (1, True),
    "caption_found": (1, True),
}


@dataclass(frozen=True)
class Pair:
    """Two groups by position, `better` first where one is; `reasons` is why they cannot be compared, if so."""

    metric: Metric
    a: int
    b: int
    contrast: Contrast | None
    p: float | None  # adjusted for the pairs of this metric
    reasons: list[str]

    @property
    def is_quiet(self) -> bool:
        """Whether it was tested and no difference shown."""
        return self.p is not None and self.p >= LEVEL


@dataclass(frozen=True)
class Comparison:
    runs: list[Run]
    groups: list[Group]
    differences: list[Difference]
    metrics: list[Metric]
    means: dict[str, list[Mean | None]]  # by metric, one a group
    remarks: dict[str, list[list[str]]]  # by metric: why a group's value is not comparable with the first's
    pairs: list[Pair]

    @property
    def sentences(self) -> list[str]:
        """What the headline metrics show of the best group against each other one; the differences shown come first."""
        told = [pair for pair in self.pairs if pair.metric.headline and self._with_best(pair)]
        loud = [sentence(pair, self.groups) for pair in told if not pair.is_quiet]
        quiet = groupby((pair for pair in told if pair.is_quiet), lambda pair: pair.metric)
        return loud + [nothing_shown(list(pairs), self.groups) for _, pairs in quiet]

    def _with_best(self, pair: Pair) -> bool:
        """The best of those that can be compared with the first, and that have two seeds if any has."""
        means, remarks = self.means[pair.metric.key], self.remarks[pair.metric.key]
        ranked = [
            (mean.count > 1, pair.metric.better * mean.value, -i)
            for i, mean in enumerate(means)
            if mean is not None and not remarks[i]
        ]
        return bool(ranked) and -max(ranked)[2] in (pair.a, pair.b)


def compare(runs: list[Run]) -> Comparison:
    """Raises ValueError where no run has anything to compare."""
    found = means_of(runs)
    pairs = [pair for metric in found.metrics if metric.better for pair in _pairs(metric, found.groups)]
    return replace(found, pairs=pairs)


def means_of(runs: list[Run]) -> Comparison:
    """Without the pairs, of which there are many where there are many groups."""
    groups, differences = group_runs(runs)
    if not groups:
        raise ValueError(
            "none of these folders holds a run: " + "; ".join(f"{run.path} ({run.note or run.state})" for run in runs)
        )
    metrics = metrics_of([group.runs for group in groups])
    means = {m.key: [mean(list(v.values())) if (v := g.values(m.key)) else None for g in groups] for m in metrics}
    remarks = {metric.key: _remarks(metric, groups) for metric in metrics}
    return Comparison(runs, groups, differences, metrics, means, remarks, [])


def metrics_of(groups: list[list[Run]]) -> list[Metric]:
    """Those that any run has: the known ones in their order, parts of accuracy, validation, then what is not known.

    Validation numbers are the headline where no two groups share one that generated images gave.
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
    told = {metric.key for metric in [*known, *parts, *validation]}
    others = (Metric(name, name, 0, headline=False) for name in names if name not in told)
    return [*known, *parts, *validation, *others]


def _is_shared(metric: Metric, groups: list[list[Run]]) -> bool:
    return sum(any(metric.key in run.metrics for run in runs) for runs in groups) > 1


def _validation(name: str, headline: bool) -> Metric:
    _, data, leaf = name.split("/", 2)
    better, percent = VALIDATION.get(leaf, (0, False))
    return Metric(name, f"validation {leaf.replace('_', ' ')} on {data}", better, percent, headline and better != 0)


def _against(metric: str, runs: list[Run], first: Run) -> list[str]:
    reasons = (incomparable(metric, first.provenance, run.provenance) for run in runs)
    return list(dict.fromkeys(reason for found in reasons for reason in found))


def _measured(metric: str, group: Group) -> list[Run]:
    return [run for run in group.runs if metric in run.metrics]


def _remarks(metric: Metric, groups: list[Group]) -> list[list[str]]:
    measured = [_measured(metric.key, group) for group in groups]
    first = next(runs[0] for runs in measured if runs)
    return [_against(metric.key, runs, first) for runs in measured]


def _pairs(metric: Metric, groups: list[Group]) -> list[Pair]:
    found = []
    for a, b in combinations(range(len(groups)), 2):
        runs = [*_measured(metric.key, groups[a]), *_measured(metric.key, groups[b])]
        values = groups[a].values(metric.key), groups[b].values(metric.key)
        if not all(values):
            continue
        if reasons := _against(metric.key, runs, runs[0]):
            found.append(Pair(metric, a, b, None, None, reasons))
            continue
        result = contrast(*values)
        if result.difference * metric.better < 0:
            a, b, result = b, a, contrast(*reversed(values))
        found.append(Pair(metric, a, b, result, result.p, []))
    tested = [pair for pair in found if pair.p is not None]
    adjusted = iter(holm([pair.p for pair in tested if pair.p is not None]))
    return [replace(pair, p=next(adjusted)) if pair.p is not None else pair for pair in found]


def sentence(pair: Pair, groups: list[Group]) -> str:
    """What a pair shows, and no more than that."""
    a, b, title = groups[pair.a].name, groups[pair.b].name, pair.metric.title
    if pair.contrast is None:
        return f"{title} of {a} and of {b} cannot be compared: {'; '.join(pair.reasons)}."
    by = pair.metric.write_difference(pair.contrast.difference, pair.contrast.half)
    if pair.contrast.half is None or pair.p is None:
        return f"{title}: {a} is better than {b} by {by}, but with one seed a side nothing is shown."
    if pair.is_quiet:
        return f"{title}: no difference shown between {a} and {b} ({by}, {_how(pair)})."
    return f"{a} beats {b} by {by} {title}, {_how(pair)}."


def nothing_shown(pairs: list[Pair], groups: list[Group]) -> str:
    """One sentence for all quiet pairs of a metric with its best group."""
    if len(pairs) == 1:
        return sentence(pairs[0], groups)
    (best,) = set.intersection(*({pair.a, pair.b} for pair in pairs))
    others = ", ".join(groups[pair.a + pair.b - best].name for pair in pairs)
    least = min(pair.p for pair in pairs if pair.p is not None)
    title, name = pairs[0].metric.title, groups[best].name
    return f"{title}: no difference shown between {name}, the best, and {others} (p from {least:.2g} up)."


def _how(pair: Pair) -> str:
    assert pair.contrast is not None and pair.p is not None
    seeds = f"{pair.contrast.count} seeds" + ("" if pair.contrast.paired else " a side, unpaired")
    return f"{seeds}, p = {pair.p:.2g}" if pair.p >= 1e-4 else f"{seeds}, p < 0.0001"


def plain(comparison: Comparison) -> dict[str, Any]:
    """All of it as data for JSON."""
    groups, means, remarks = comparison.groups, comparison.means, comparison.remarks
    return {
        "sentences": comparison.sentences,
        "groups": [
            {
                "name": group.name,
                "runs": [str(run.path) for run in group.runs],
                "seeds": [run.seed for run in group.runs],
                "settings": {d.key: d.values[i] for d in comparison.differences},
                "metrics": {
                    key: {"mean": m.value, "half_interval": m.half, "count": m.count, "not_comparable": remarks[key][i]}
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
