"""The plots of a comparison, each a function of it; small enough in inches to be read on a phone."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ldm.metrics.provenance import incomparable
from ldm.report.comparison import Comparison, Metric
from ldm.report.groups import Group, label_of
from ldm.report.runs import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe & Ito
MARKERS, DASHES = "osD^vPX*", ("-", "--", "-.", ":")
ROOM = 6  # names that fit among the curves
OBJECTIVE = ("schedule", "prediction", "weighting", "times", "training")  # what makes losses other quantities
FORMATS = ("svg", "pdf")


@dataclass(frozen=True)
class Plot:
    """`name` is that of its file."""

    name: str
    title: str
    note: str
    figure: "Figure"

    def svg(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()


def plots(comparison: Comparison) -> list[Plot]:
    """Those that the runs have data for. Raises ValueError where matplotlib is not installed."""
    found = [_by_noise(comparison)]
    found += [_curve(comparison, name, over) for name in _scalars(comparison) for over in ("images", "minutes")]
    headline = next((metric for metric in comparison.metrics if metric.headline), None)
    if headline is not None:
        found += paretos(comparison, headline)
    return [plot for plot in found if plot is not None]


def drawn(made: Sequence[Plot], prefix: str = "") -> dict[str, bytes]:
    """Each as SVG and PDF, by the name of its file."""
    return {f"{prefix}{plot.name}.{form}": _bytes(plot, form) for plot in made for form in FORMATS}


def _bytes(plot: Plot, form: str) -> bytes:
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format=form)
    return buffer.getvalue()


def _axes(x: str, y: str) -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the report's plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index // len(COLORS) % len(DASHES)]}


def _legend(axes: "Axes") -> None:
    """Among the curves, or below them where it would hide them; none for one name."""
    shown = len(axes.get_legend_handles_labels()[1])
    if 1 < shown <= ROOM:
        axes.legend(fontsize=7.5, frameon=False, loc="best")
    elif shown > ROOM:
        figure: Any = axes.figure
        figure.set_figheight(figure.get_figheight() + 0.15 * ((shown + 1) // 2))
        figure.legend(fontsize=6.5, frameon=False, loc="outside lower center", ncols=2)


def _by_noise(comparison: Comparison) -> Plot | None:
    """The mean over seeds of the error at each log-SNR, and the seeds' range."""
    figure, axes = _axes("log-SNR (noise ← → signal)", "squared error of x0")
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
    note = "Same pictures and same noise for every run, so the curves differ by the models alone; bands span the seeds."
    note += f" {len(runs) - len(fits)} run(s) measured on other data or levels are left out." if runs != fits else ""
    return Plot("error_by_noise", "Error by noise level", note, figure)


def _name(group: Group) -> str:
    name = group.name
    return name if len(name) <= 44 else f"{name[:43]}…"


def _scalars(comparison: Comparison) -> list[str]:
    """Validation first, then the training loss; not the parts of a loss (val/SET/loss_by_log_snr/RANGE)."""
    names = dict.fromkeys(name for group in comparison.groups for run in group.runs for name in run.scalars)
    validation = sorted(name for name in names if name.startswith("val/") and name.count("/") == 2)
    return [*validation, *(name for name in names if name == "train/loss")]


def _curve(comparison: Comparison, scalar: str, over: str) -> Plot | None:
    """A thin line for each run, smoothed where it is noisy."""
    label = "training images seen" if over == "images" else "minutes of training"
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
    note = "One line a run."
    if any(d.key.startswith(OBJECTIVE) for d in comparison.differences):
        note += " The groups' objectives differ, so heights of losses are not comparable, only their course."
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
    """An average over about a tenth of the curve, exponential and without a bias towards its start."""
    keep, total, weight, values = 1 - 10 / max(20, len(curve.values)), 0.0, 0.0, []
    for value in curve.values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        values.append(total / weight)
    return values


def _seconds_a_picture(run: Run) -> float | None:
    count = (run.provenance.get("prompts") or {}).get("count")
    return run.metrics["sampling_seconds"] / count if count and "sampling_seconds" in run.metrics else None


COSTS: tuple[tuple[str, str, Callable[[Run], float | None]], ...] = (
    ("seconds", "seconds a picture", _seconds_a_picture),
    ("nfe", "network calls a picture (NFE)", lambda run: run.metrics.get("nfe") or None),
    ("training", "minutes of training", lambda run: run.metrics.get("training_seconds", 0) / 60 or None),
)


def paretos(comparison: Comparison, metric: Metric) -> list[Plot]:
    """Quality against each cost that is known of two runs or more."""
    found = [_pareto(comparison, metric, *axis) for axis in COSTS]
    return [plot for plot in found if plot is not None]


def _pareto(
    comparison: Comparison, metric: Metric, name: str, label: str, cost: Callable[[Run], float | None]
) -> Plot | None:
    """Quality against what it costs: means, and faintly each run; a line joins those that none beats in both."""
    figure, axes = _axes(label, f"{metric.title}, %" if metric.percent else metric.title)
    scale = 100 if metric.percent else 1
    means: list[tuple[float, float]] = []
    shown = count = 0
    for title, groups in _series(comparison, metric):
        values = [
            [(c, scale * r.metrics[metric.key]) for r in _measured(group, metric) if (c := cost(r))] for group in groups
        ]
        if not (runs := [point for found in values for point in found]):
            continue
        color, marker = COLORS[shown % len(COLORS)], MARKERS[shown % len(MARKERS)]
        middles = sorted((fmean(c for c, _ in found), fmean(v for _, v in found)) for found in values if found)
        axes.plot(*zip(*middles, strict=True), lw=1, color=color, marker=marker, ms=5, label=title)
        if len(runs) > len(middles):
            axes.scatter([c for c, _ in runs], [v for _, v in runs], s=9, color=color, alpha=0.4, linewidths=0)
        means, shown, count = means + middles, shown + 1, count + len(runs)
    if count < 2:
        return None
    costs = [cost for cost, _ in means]
    if max(costs) > 5 * min(costs):
        axes.set_xscale("log")
    unbeaten = front(means, metric.better)
    axes.plot(*zip(*unbeaten, strict=True), lw=6, color="#888888", alpha=0.3, zorder=0, solid_capstyle="round")
    _legend(axes)
    left_out = sum(map(bool, comparison.remarks[metric.key]))
    note = "Small dots are runs. The broad line joins the means that no other beats in both."
    note += f" {left_out} group(s) that are not comparable are left out." if left_out else ""
    key = metric.key.replace("/", "_")
    return Plot(f"{key}_by_{name}", f"{metric.title} against {label}", note, figure)


def _measured(group: Group, metric: Metric) -> list[Run]:
    return [run for run in group.runs if metric.key in run.metrics]


def _series(comparison: Comparison, metric: Metric) -> list[tuple[str, list[Group]]]:
    """Comparable groups; those that differ only in their number of sampling steps together, in a line."""
    others = [d for d in comparison.differences if d.key.rpartition(".")[2] != "steps"]
    found: dict[tuple[str, ...], list[int]] = {}
    for index in range(len(comparison.groups)):
        if not comparison.remarks[metric.key][index]:
            found.setdefault(tuple(d.values[index] for d in others), []).append(index)
    told = [d for d in others if "_options." not in d.key]
    titles = {key: label_of(told, members[0], 34) for key, members in found.items()}
    chosen = {key: [comparison.groups[i] for i in members] for key, members in found.items()}
    return [(titles[key] if len(groups) > 1 else _name(groups[0]), groups) for key, groups in chosen.items()]


def front(points: list[tuple[float, float]], better: int) -> list[tuple[float, float]]:
    """The (cost, value) that no other beats in both, by cost."""
    found: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -better * point[1])):
        if not found or better * value > better * found[-1][1]:
            found.append((cost, value))
    return found
