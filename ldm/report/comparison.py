"""Compares groups of runs: means, differences with p-values, and the conclusions that these support."""

from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from ldm.metrics.few_samples import few_samples, image_count
from ldm.metrics.provenance import incomparable
from ldm.metrics.sample_sizes import MIN_IMAGES, MIN_SEEDS
from ldm.report.coverage import coverage
from ldm.report.groups import Difference, Group, group_runs
from ldm.report.metric import Metric, is_evaluation, metrics_of
from ldm.report.runs import Run
from ldm.report.statistics import LEVEL, Contrast, Mean, contrast, holm, mean


@dataclass(frozen=True)
class GroupPair:
    """Positions of two groups, the better one first; `reasons` lists why they cannot be compared.

    `few` lists the counts that are too low to claim a difference, in which case there is no p-value.
    """

    metric: Metric
    a: int
    b: int
    contrast: Contrast | None
    p: float | None  # adjusted for the pairs of this metric
    reasons: list[str]
    few: list[str] = field(default_factory=list)
    images: int | None = None  # the number that the metric was measured on
    warning: str | None = None  # about the number of images

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
        """Conclusions on the best group against each other one, by headline metric: differences that are shown, then
        in one sentence each, metrics that show none, that were measured too little, and that cannot be compared."""
        chosen = [pair for pair in self.pairs if pair.metric.headline and self._has_best(pair)]
        shown = [sentence(pair, self.groups) for pair in chosen if pair.p is not None and not pair.is_insignificant]
        return [*shown, *no_difference(chosen), *too_little(chosen), *not_comparable(chosen, self.groups)]

    @property
    def not_evaluated(self) -> list[Run]:
        """The runs, other than those still in progress, whose results were not measured, except by their loss."""
        runs = [run for group in self.groups for run in group.runs if run.state != "in progress"]
        return [run for run in runs if not any(map(is_evaluation, run.metrics))]

    @property
    def coverage(self) -> str:
        """A sentence on what the intervals cover, "" if there are none."""
        return coverage(self.groups)

    def warnings(self, metric: str, group: int) -> list[str]:
        """Returns the warnings about the number of images that a group's value was measured on."""
        found = (few_samples(metric, run.provenance) for run in _measured(metric, self.groups[group]))
        return list(dict.fromkeys(text for text in found if text))

    def _has_best(self, pair: GroupPair) -> bool:
        """Whether the pair includes the best group among those that are comparable with the first.

        Groups with fewer seeds than `MIN_SEEDS` are not the best if any group has more.
        """
        means, reasons = self.means[pair.metric.key], self.not_comparable[pair.metric.key]
        ranked = [
            (min(mean.count, MIN_SEEDS), pair.metric.better * mean.value, -i)
            for i, mean in enumerate(means)
            if mean is not None and not reasons[i]
        ]
        return bool(ranked) and -max(ranked)[2] in (pair.a, pair.b)


def compare(runs: list[Run]) -> Comparison:
    """Compares groups and pairs of groups of runs. Raises ValueError if no run has a metric to compare."""
    comparison = means_of(runs)
    pairs = [pair for metric in comparison.metrics if metric.better for pair in _pairs(metric, comparison.groups)]
    return replace(comparison, pairs=pairs)


def means_of(runs: list[Run]) -> Comparison:
    """Compares groups without pairs, whose number grows with the square of the number of groups."""
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
        images = min((n for run in runs if (n := image_count(metric.key, run.provenance)) is not None), default=None)
        warning = next((text for run in runs if (text := few_samples(metric.key, run.provenance))), None)
        few = _too_few(result.count, images)
        pairs.append(GroupPair(metric, a, b, result, None if few else result.p, [], few, images, warning))
    adjusted = iter(holm([pair.p for pair in pairs if pair.p is not None]))
    return [replace(pair, p=next(adjusted)) if pair.p is not None else pair for pair in pairs]


def _too_few(seeds: int, images: int | None) -> list[str]:
    """Returns the counts that are too low to claim a difference, each with the required minimum."""
    few = [f"{seeds} seed{'s' if seeds > 1 else ''} of at least {MIN_SEEDS}"] if seeds < MIN_SEEDS else []
    return few + ([f"{images} images of at least {MIN_IMAGES}"] if images is not None and images < MIN_IMAGES else [])


def sentence(pair: GroupPair, groups: list[Group]) -> str:
    """States a difference that is shown."""
    assert pair.contrast is not None
    by = pair.metric.write_difference(pair.contrast.difference, pair.contrast.half)
    return f"{groups[pair.a].short} beats {groups[pair.b].short} by {by} {pair.metric.title}, {_how(pair)}."


def no_difference(pairs: list[GroupPair]) -> list[str]:
    """States in one sentence which metrics show no difference, if any."""
    insignificant = [pair for pair in pairs if pair.is_insignificant]
    if not insignificant:
        return []
    least = min(pair.p for pair in insignificant if pair.p is not None)
    shown = {pair.metric.key for pair in pairs if pair.p is not None and not pair.is_insignificant}
    titles = [f"{m.title} otherwise" if m.key in shown else m.title for m in _metrics(insignificant)]
    return [f"No difference shown in {listed(titles)} (p from {least:.2g} up)."]


def too_little(pairs: list[GroupPair]) -> list[str]:
    """States for each number of seeds and images that is too low which metrics it concerns."""
    by_counts: dict[str, list[GroupPair]] = {}
    for pair in pairs:
        if pair.contrast is not None and pair.few:
            by_counts.setdefault(" and ".join(pair.few), []).append(pair)
    titles = {counts: listed([metric.title for metric in _metrics(chosen)]) for counts, chosen in by_counts.items()}
    return [f"Too little to claim a difference in {names}: {counts}." for counts, names in titles.items()]


def not_comparable(pairs: list[GroupPair], groups: list[Group]) -> list[str]:
    """States which groups cannot be compared, once for metrics and groups with the same reasons."""
    by_reasons: dict[tuple[str, ...], list[GroupPair]] = {}
    for pair in pairs:
        if pair.contrast is None:
            by_reasons.setdefault(tuple(pair.reasons), []).append(pair)
    found = []
    for reasons, chosen in by_reasons.items():
        titles = listed([metric.title for metric in _metrics(chosen)])
        found.append(f"{titles} of {_apart([{pair.a, pair.b} for pair in chosen], groups)}: {'; '.join(reasons)}.")
    return found


def _apart(pairs: list[set[int]], groups: list[Group]) -> str:
    """Says which groups cannot be compared, naming first the one that is in all pairs, if only one is."""
    every, common = set.union(*pairs), set.intersection(*pairs)
    names = {i: groups[i].short for i in sorted(every)}
    if len(common) != 1:
        return f"{listed([*names.values()])} cannot be compared"
    (odd,) = common
    return f"{names.pop(odd)} cannot be compared with those of {listed([*names.values()])}"


def _metrics(pairs: list[GroupPair]) -> list[Metric]:
    return list({pair.metric.key: pair.metric for pair in pairs}.values())


def listed(words: list[str]) -> str:
    """Joins words as in "a, b and c"."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def _how(pair: GroupPair) -> str:
    assert pair.contrast is not None and pair.p is not None
    seeds = f"{pair.contrast.count} seeds" + ("" if pair.contrast.paired else " per group, unpaired")
    images = "" if pair.images is None else f", {pair.images} images"
    p = f"p = {pair.p:.2g}" if pair.p >= 1e-4 else "p < 0.0001"
    return f"{seeds}{images}, {p}" + (f"; {pair.warning}" if pair.warning else "")


def plain(comparison: Comparison) -> dict[str, Any]:
    """Returns the contents of report.json."""
    groups, means, reasons = comparison.groups, comparison.means, comparison.not_comparable
    return {
        "sentences": comparison.sentences,
        "interval": comparison.coverage,
        "least": {"seeds": MIN_SEEDS, "images": MIN_IMAGES},
        "not_evaluated": [str(run.path) for run in comparison.not_evaluated],
        "groups": [
            {
                "name": group.name,
                "runs": [str(run.path) for run in group.runs],
                "seeds": [run.seed for run in group.runs],
                "noise": [run.noise for run in group.runs],
                "settings": {d.key: d.values[i] for d in comparison.differences},
                "metrics": {
                    key: {
                        "mean": m.value,
                        "half_interval": m.half,
                        "count": m.count,
                        "not_comparable": reasons[key][i],
                        "warnings": comparison.warnings(key, i),
                    }
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
                "images": pair.images,
                "too_few": pair.few,
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
