"""Reports a sweep over sampling settings as a table and plots of quality against cost."""

from collections.abc import Sequence
from glob import escape
from pathlib import Path
from statistics import fmean

from ldm.files import write_bytes
from ldm.report.comparison import Comparison, means_of
from ldm.report.figures import COSTS, FORMATS, front, paretos, rendered
from ldm.report.groups import Group
from ldm.report.metric import Metric
from ldm.report.runs import read_runs

NONE = "–"


def write_sweep(file: Path) -> str:
    """Writes a sweep's table, NAME.md, and its plots, NAME_METRIC_by_COST, beside its JSON file NAME.json.

    Returns the table and the paths of all files. Raises ValueError if no metric can be ranked.
    """
    comparison = means_of(read_runs(file))
    headline = next((metric for metric in comparison.metrics if metric.headline), None)
    if headline is None:
        raise ValueError(f"{file} has too few images for any metric; use more prompts")
    text = "\n\n".join([table(comparison, headline), *notes(comparison)])
    written = {file.with_suffix(".md").name: f"{text}\n".encode()}
    written |= rendered(paretos(comparison, headline), f"{file.stem}_")
    for name, data in written.items():
        write_bytes(file.with_name(name), data)
    return "\n".join([text, "", *map(str, [file, *(file.with_name(name) for name in written)])])


def beside(file: Path) -> list[Path]:
    """Returns the existing files with the names of a sweep's table and plots."""
    table = file.with_suffix(".md")
    plots = [path for form in FORMATS for path in file.parent.glob(f"{escape(file.stem)}_*_by_*.{form}")]
    return [*([table] if table.exists() else []), *sorted(plots)]


def table(comparison: Comparison, headline: Metric) -> str:
    """Returns a Markdown table with one row per setting; ● marks the Pareto front of `headline` and network calls."""
    chosen = [d for d in comparison.differences if "_options." not in d.key]  # options follow from the sampler
    settings = [d.key.rpartition(".")[2] for d in chosen]
    metrics = [metric for metric in comparison.metrics if metric.headline and metric.key != "noise_loss"]
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    header = ["", *settings, "NFE", "s/image", *(metric.title + arrows[metric.better] for metric in metrics)]
    best = _pareto(comparison, headline)
    rows = []
    for index, group in enumerate(comparison.groups):
        cells = ["●" if index in best else "", *(d.values[index] for d in chosen)]
        cells += [f"{_cost(group, 'nfe'):.4g}", f"{_cost(group, 'seconds'):.3g}"]
        for metric in metrics:
            mean = comparison.means[metric.key][index]
            cells.append(NONE if mean is None else metric.write(mean.value, mean.half))
        rows.append(cells)
    return aligned(header, rows)


def notes(comparison: Comparison) -> list[str]:
    """Returns the warnings about few images, and what the intervals cover."""
    warnings = dict.fromkeys(
        f"{metric.title}: {text}"
        for metric in comparison.metrics
        if metric.headline
        for index in range(len(comparison.groups))
        for text in comparison.warnings(metric.key, index)
    )
    return [*warnings, *([comparison.coverage] if comparison.coverage else [])]


def _pareto(comparison: Comparison, metric: Metric) -> set[int]:
    means = comparison.means[metric.key]
    points = {i: (_cost(g, "nfe"), m.value) for i, (g, m) in enumerate(zip(comparison.groups, means, strict=True)) if m}
    pareto = front(list(points.values()), metric.better)
    return {i for i, point in points.items() if point in pareto}


def _cost(group: Group, name: str) -> float:
    cost = next(of for key, _, of in COSTS if key == name)
    return fmean(cost(run) or 0.0 for run in group.runs)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with aligned columns, which is also readable as plain text."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )
