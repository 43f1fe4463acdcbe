"""Plots of a comparison, sized to be readable on a phone."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ldm.metrics.provenance import incomparable
from ldm.report.comparison import Comparison
from ldm.report.groups import Group, label_of
from ldm.report.metric import ARROWS, Metric
from ldm.report.runs import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe & Ito
MARKERS, DASHES = "osD^vPX*", ("-", "--", "-.", ":")
MOST = 8  # panels of the means
ROOM = 6  # legend entries that fit inside the axes
OBJECTIVE = ("schedule", "prediction", "weighting", "times", "training")  # settings that define the loss
FORMATS = ("svg", "pdf")


@dataclass(frozen=True)
class Plot:
    """A figure; `name` is that of its file, without the extension.

    With `lettered` it calls the groups by their letters, and a page with a legend of its own shows it without that of
    the figure.
    """

    name: str
    title: str
    note: str
    figure: "Figure"
    lettered: bool = False

    def svg(self) -> bytes:
        """Renders the figure for a page."""
        buffer, legends = io.BytesIO(), self.figure.legends if self.lettered else []
        for legend in legends:
            legend.set_visible(False)
        fit = "tight" if legends else None  # leaves out the room of the legends
        self.figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches=fit)
        for legend in legends:
            legend.set_visible(True)
        return buffer.getvalue()


def plots(comparison: Comparison) -> list[Plot]:
    """Returns the plots that the runs have data for. Raises ValueError if matplotlib is not installed."""
    candidates = [_means(comparison), _by_noise(comparison)]
    candidates += [_curve(comparison, name, over) for name in _scalars(comparison) for over in ("images", "minutes")]
    headline = next((metric for metric in comparison.metrics if metric.headline), None)
    if headline is not None:
        candidates += paretos(comparison, headline)
    return [plot for plot in candidates if plot is not None]


def rendered(figures: Sequence[Plot], prefix: str = "") -> dict[str, bytes]:
    """Renders each plot as SVG and PDF; returns the contents by file name."""
    return {f"{prefix}{plot.name}.{form}": _bytes(plot, form) for plot in figures for form in FORMATS}


def _bytes(plot: Plot, form: str) -> bytes:
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format=form)
    return buffer.getvalue()


def _figure(width: float = 4.8, height: float = 3.4) -> "Figure":
    """Returns an empty figure of this size in inches. Raises ValueError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the report's plots need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _axes(x: str, y: str) -> "tuple[Figure, Axes]":
    figure = _figure()
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index // len(COLORS) % len(DASHES)]}


def _legend(axes: "Axes") -> None:
    """Adds a legend inside the axes, or below them if it is long; none for a single entry."""
    shown = len(axes.get_legend_handles_labels()[1])
    if 1 < shown <= ROOM:
        axes.legend(fontsize=7.5, frameon=False, loc="best")
    elif shown > ROOM:
        figure: Any = axes.figure
        figure.set_figheight(figure.get_figheight() + 0.15 * ((shown + 1) // 2))
        figure.legend(fontsize=6.5, frameon=False, loc="outside lower center", ncols=2)


def _means(comparison: Comparison) -> Plot | None:
    """Plots the means of the main metrics with their intervals, and the single runs, with a row for each group."""
    metrics = [metric for metric in comparison.metrics if metric.main]
    metrics = [metric for metric in metrics if sum(map(bool, comparison.means[metric.key])) > 1][:MOST]
    if not metrics:
        return None
    groups = comparison.groups
    columns, height = min(2, len(metrics)), 0.75 + 0.24 * len(groups)
    lines = -(-len(metrics) // columns)
    names = [group.name for group in groups if group.letter]
    figure = _figure(height=height * lines + 0.16 * len(names))
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for panel in panels[len(metrics) :]:
        panel.remove()
    for panel, metric in zip(panels, metrics, strict=False):
        _panel(panel, comparison, metric)
    marks = [
        panels[0].plot([], [], MARKERS[row % len(MARKERS)], c=COLORS[row % len(COLORS)])[0] for row in range(len(names))
    ]
    figure.legend(marks, names, fontsize=6.5, frameon=False, loc="outside lower center")
    note = "Means with 95 % intervals over seeds; small dots are single runs."
    if any(reasons for metric in metrics for reasons in comparison.not_comparable[metric.key]):
        note += " Hollow: not comparable with the first."
    return Plot("means", "Means", note, figure, lettered=True)


def _panel(axes: "Axes", comparison: Comparison, metric: Metric) -> None:
    scale, groups = 100 if metric.percent else 1, comparison.groups
    for row, (group, mean) in enumerate(zip(groups, comparison.means[metric.key], strict=True)):
        if mean is None:
            continue
        color = COLORS[row % len(COLORS)]
        values = [scale * value for value in group.values(metric.key).values()]
        axes.scatter(values, [row + 0.22] * len(values), s=9, color=color, alpha=0.4, linewidths=0)
        axes.errorbar(
            *(scale * mean.value, row),
            xerr=None if mean.half is None else scale * mean.half,
            fmt=MARKERS[row % len(MARKERS)],
            color=color,
            markerfacecolor="white" if comparison.not_comparable[metric.key][row] else color,
            markersize=5,
            capsize=3,
        )
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_yticks(range(len(groups)), [group.short[:12] for group in groups])
    axes.set_title(f"{metric.title}{', %' if metric.percent else ''}{ARROWS[metric.better]}", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _by_noise(comparison: Comparison) -> Plot | None:
    """Plots the mean over seeds of the error at each log-SNR, and the range of the seeds."""
    figure, axes = _axes("log-SNR (noise ← → signal)", "mean squared error of x0")
    runs = [run for group in comparison.groups for run in group.runs if run.by_noise]
    if not runs:
        return None
    levels, about = runs[0].by_noise["log_snr"], runs[0].provenance
    fits = [run for run in runs if run.by_noise["log_snr"] == levels]
    fits = [run for run in fits if not incomparable("noise_loss", about, run.provenance)]
    for index, group in enumerate(comparison.groups):
        curves = [run.by_noise["mean"] for run in group.runs if run in fits]
        if curves:
            columns = list(zip(*curves, strict=True))
            means = [math.fsum(column) / len(column) for column in columns]
            low, high = [min(column) for column in columns], [max(column) for column in columns]
            axes.plot(levels, means, marker=MARKERS[index % len(MARKERS)], ms=3.5, label=_name(group), **_style(index))
            axes.fill_between(levels, low, high, alpha=0.15, color=COLORS[index % len(COLORS)], linewidth=0)
    axes.set_yscale("log")
    _legend(axes)
    note = "All runs use the same images and the same noise, so only the models differ; bands span the seeds."
    note += f" {len(runs) - len(fits)} run(s) measured on other data or levels are left out." if runs != fits else ""
    return Plot("error_by_noise", "Error by noise level", note, figure)


def _name(group: Group) -> str:
    name = group.name
    return name if len(name) <= 44 else f"{name[:43]}…"


def _scalars(comparison: Comparison) -> list[str]:
    """Returns validation scalars, then the training loss, without a loss's parts (val/SET/loss_by_log_snr/RANGE)."""
    names = dict.fromkeys(name for group in comparison.groups for run in group.runs for name in run.scalars)
    validation = sorted(name for name in names if name.startswith("val/") and name.count("/") == 2)
    return [*validation, *(name for name in names if name == "train/loss")]


def _curve(comparison: Comparison, scalar: str, over: str) -> Plot | None:
    """Plots a scalar with one line per run; training scalars are smoothed."""
    label = "training images seen" if over == "images" else "training time in minutes"
    figure, axes = _axes(label, scalar)
    shown = 0
    for index, group in enumerate(comparison.groups):
        first = True
        for run in group.runs:
            line = _line(run, scalar, over)
            if line is None:
                continue
            axes.plot(
                *line, lw=1.2, marker="." if len(line[0]) < 12 else None, label=_name(group) if first else None,
                **_style(index),
            )  # fmt: skip
            shown, first = shown + first, False
    if not shown:
        return None
    _legend(axes)
    note = "One line per run."
    if any(d.key.startswith(OBJECTIVE) for d in comparison.differences):
        note += " The objectives differ, so only the shapes of their loss curves are comparable, not the values."
    if scalar == "train/loss":
        note += " Smoothed."
    name = f"{scalar.replace('/', '_')}_by_{over}"
    return Plot(name, f"{scalar} against {label}", note, figure)


def _line(run: Run, scalar: str, over: str) -> tuple[list[float], list[float]] | None:
    curve = run.scalars.get(scalar)
    if curve is None:
        return None
    x = [float((step + 1) * run.batch) for step in curve.steps] if over == "images" else run.minutes(curve.steps)
    return None if x is None else (x, _smooth(curve) if scalar.startswith("train/") else curve.values)


def _smooth(curve: Curve) -> list[float]:
    """Returns the bias-corrected exponential moving average over about a tenth of the curve."""
    keep, total, weight, values = 1 - 10 / max(20, len(curve.values)), 0.0, 0.0, []
    for value in curve.values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        values.append(total / weight)
    return values


def _seconds_per_image(run: Run) -> float | None:
    count = (run.provenance.get("prompts") or {}).get("count")
    return run.metrics["sampling_seconds"] / count if count and "sampling_seconds" in run.metrics else None


COSTS: tuple[tuple[str, str, Callable[[Run], float | None]], ...] = (
    ("seconds", "seconds per image", _seconds_per_image),
    ("nfe", "network calls per image (NFE)", lambda run: run.metrics.get("nfe") or None),
    ("training", "training time in minutes", lambda run: run.metrics.get("training_seconds", 0) / 60 or None),
)


def paretos(comparison: Comparison, metric: Metric) -> list[Plot]:
    """Plots quality against each cost that at least two runs have."""
    candidates = [_pareto(comparison, metric, *axis) for axis in COSTS]
    return [plot for plot in candidates if plot is not None]


def _pareto(
    comparison: Comparison, metric: Metric, name: str, label: str, cost: Callable[[Run], float | None]
) -> Plot | None:
    """Plots quality against cost: group means, single runs as small dots, and the Pareto front as a broad line."""
    figure, axes = _axes(label, f"{metric.title}, %" if metric.percent else metric.title)
    scale = 100 if metric.percent else 1
    means: list[tuple[float, float]] = []
    count = 0
    for index, title, groups in _series(comparison, metric):
        values = [
            [(c, scale * r.metrics[metric.key]) for r in _measured(group, metric) if (c := cost(r))] for group in groups
        ]
        if not (runs := [point for points in values for point in points]):
            continue
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        centers = sorted((fmean(c for c, _ in points), fmean(v for _, v in points)) for points in values if points)
        axes.plot(*zip(*centers, strict=True), lw=1, color=color, marker=marker, ms=5, label=title)
        if len(runs) > len(centers):
            axes.scatter([c for c, _ in runs], [v for _, v in runs], s=9, color=color, alpha=0.4, linewidths=0)
        means, count = means + centers, count + len(runs)
    if count < 2:
        return None
    costs = [cost for cost, _ in means]
    if max(costs) > 5 * min(costs):
        axes.set_xscale("log", subs=(2, 5))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    pareto = front(means, metric.better)
    axes.plot(*zip(*pareto, strict=True), lw=6, color="#888888", alpha=0.3, zorder=0, solid_capstyle="round")
    _legend(axes)
    left_out = [g.short for g, why in zip(comparison.groups, comparison.not_comparable[metric.key], strict=True) if why]
    note = "Small dots are single runs. The broad line is the Pareto front of the means."
    note += f" Left out, because not comparable: {', '.join(left_out)}." if left_out else ""
    key = metric.key.replace("/", "_")
    return Plot(f"{key}_by_{name}", f"{metric.title} against {label}", note, figure)


def _measured(group: Group, metric: Metric) -> list[Run]:
    return [run for run in group.runs if metric.key in run.metrics]


def _series(comparison: Comparison, metric: Metric) -> list[tuple[int, str, list[Group]]]:
    """Returns the comparable groups as lines; groups that differ only in their number of sampling steps share one.

    Each has the index of its color, which is that of its group in the other plots if each line is one group.
    """
    others = [d for d in comparison.differences if d.key.rpartition(".")[2] != "steps"]
    lines: dict[tuple[str, ...], list[int]] = {}
    for index in range(len(comparison.groups)):
        if not comparison.not_comparable[metric.key][index]:
            lines.setdefault(tuple(d.values[index] for d in others), []).append(index)
    named = [d for d in others if "_options." not in d.key]
    titles = {key: label_of(named, members[0], 34) for key, members in lines.items()}
    chosen = {key: [comparison.groups[i] for i in members] for key, members in lines.items()}
    single = all(len(members) == 1 for members in lines.values())
    return [
        (members[0] if single else row, titles[key] if len(members) > 1 else _name(chosen[key][0]), chosen[key])
        for row, (key, members) in enumerate(lines.items())
    ]


def front(points: list[tuple[float, float]], better: int) -> list[tuple[float, float]]:
    """Returns the Pareto front of (cost, value) points, sorted by cost."""
    pareto: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -better * point[1])):
        if not pareto or better * value > better * pareto[-1][1]:
            pareto.append((cost, value))
    return pareto
