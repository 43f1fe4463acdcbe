"""Plots the report of a filter: a funnel, and a histogram per column with its thresholds marked."""

from typing import Any, BinaryIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BAR, LOST, CUT = "#3b6ea5", "#d9dee4", "#c0392b"
COLUMNS = 3


def draw(steps: list[dict[str, Any]], rows: int, histograms: dict[str, dict[str, Any]], every: int = 1) -> Figure:
    """Draws `steps` from `Tally.steps` and the `histograms` of the report, which use one row in `every`."""
    grid_rows = -(-len(histograms) // COLUMNS)
    funnel_height = 0.32 * (len(steps) + 1) + 1.2  # inches
    height = funnel_height + 2.6 * grid_rows
    figure = Figure(figsize=(12, height))
    ratios = [funnel_height, *[2.6] * grid_rows]
    grid = figure.add_gridspec(1 + grid_rows, COLUMNS, height_ratios=ratios, hspace=0.4, wspace=0.22)
    # Margins are set by hand, because layout engines are slow.
    figure.subplots_adjust(left=0.16, right=0.98, top=1 - 0.4 / height, bottom=0.4 / height)
    _funnel(figure.add_subplot(grid[0, :]), steps, rows)
    if every > 1:
        figure.text(0.98, 0.1 / height, f"histograms of numbers: one row in {every:,}", ha="right", fontsize=8)
    for i, (title, histogram) in enumerate(histograms.items()):
        _histogram(figure.add_subplot(grid[1 + i // COLUMNS, i % COLUMNS]), title, **histogram)
    return figure


def save(figure: Figure, file: BinaryIO) -> None:
    figure.savefig(file, format="png", dpi=100)


def _funnel(plot: Axes, steps: list[dict[str, Any]], rows: int) -> None:
    labels = ["all rows", *(step["reason"].replace("_", " ") for step in steps)]
    left = [rows, *(step["left"] for step in steps)]
    lost = [0, *(step["rejected"] for step in steps)]
    plot.barh(labels, left, color=BAR, label="left")
    plot.barh(labels, lost, left=left, color=LOST, label="rejected here")
    for i, (count, gone) in enumerate(zip(left, lost, strict=True)):
        label = f" {count:,}" + (f"  (−{gone:,})" if gone else "")
        plot.text(count + gone, i, label, va="center", fontsize=8)
    plot.invert_yaxis()
    plot.set_xlim(0, max(rows, 1) * 1.22)
    plot.set_title(f"{left[-1]:,} of {rows:,} rows kept ({left[-1] / max(rows, 1):.2%})", loc="left")
    plot.xaxis.set_major_formatter("{x:,.0f}")
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(loc="lower right", frameon=False)


def _histogram(plot: Axes, title: str, low: float, high: float, cuts: list[float], counts: list[int]) -> None:
    width = (high - low) / len(counts)
    plot.stairs(counts, [low + i * width for i in range(len(counts) + 1)], fill=True, color=BAR)
    for cut in cuts:
        plot.axvline(cut, color=CUT, linewidth=1.2)
        plot.annotate(f"{cut:g}", (cut, 1), xycoords=("data", "axes fraction"), color=CUT, fontsize=8, ha="center")
    plot.set_xlim(low, high)
    plot.set_ylim(bottom=0)
    plot.set_yticks([])
    plot.set_title(title, fontsize=9, pad=12)
    plot.tick_params(labelsize=7)
    plot.spines[["left", "top", "right"]].set_visible(False)
