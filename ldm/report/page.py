"""Renders a comparison as one self-contained HTML page, and as Markdown."""

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from ldm.metrics.few_samples import MIN_IMAGES
from ldm.report.comparison import MIN_SEEDS, Comparison, GroupPair
from ldm.report.figures import Plot
from ldm.report.images import Row
from ldm.report.metric import Metric
from ldm.report.runs import Run
from ldm.report.statistics import LEVEL

TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html"
Cell = str
NONE = "–"


def table_of_means(comparison: Comparison) -> tuple[list[str], list[list[Cell]], list[str]]:
    """Returns the header, one row per group, and the notes that the marks [1], [2] … refer to."""
    metrics = [metric for metric in comparison.metrics if any(comparison.means[metric.key])]
    notes: list[str] = []
    rows = []
    for index, group in enumerate(comparison.groups):
        cells = [group.name, ", ".join(str(run.seed) for run in group.runs)]
        cells += [_cell(comparison, metric, index, notes) for metric in metrics]
        rows.append(cells)
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    return ["runs", "seeds", *(metric.title + arrows[metric.better] for metric in metrics)], rows, notes


def _cell(comparison: Comparison, metric: Metric, index: int, notes: list[str]) -> Cell:
    mean = comparison.means[metric.key][index]
    if mean is None:
        return NONE
    text = metric.write(mean.value, mean.half)
    reasons = [f"not comparable with the first row: {r}" for r in comparison.not_comparable[metric.key][index]]
    for reason in [*reasons, *comparison.warnings(metric.key, index)]:
        note = f"{metric.title}: {reason}"
        if note not in notes:
            notes.append(note)
        text += f" [{notes.index(note) + 1}]"
    return text


def table_of_pairs(comparison: Comparison, headline: bool) -> tuple[list[str], list[list[Cell]]]:
    """Returns the header and the rows of the pairs by the headline metrics, or by the others."""
    header = ["metric", "better", "than", "difference", "seeds", "p (Holm)", "shown?"]
    return header, [_pair(pair, comparison) for pair in comparison.pairs if pair.metric.headline == headline]


def _pair(pair: GroupPair, comparison: Comparison) -> list[Cell]:
    a, b = (comparison.groups[i] for i in (pair.a, pair.b))
    start = [pair.metric.title, a.letter or a.label, b.letter or b.label]
    if pair.contrast is None:
        return [*start, NONE, NONE, NONE, f"not comparable: {'; '.join(pair.reasons)}"]
    by = pair.metric.write_difference(pair.contrast.difference, pair.contrast.half)
    if pair.few or pair.p is None:
        return [*start, by, str(pair.contrast.count), NONE, f"no: {', '.join(pair.few)}"]
    seeds = f"{pair.contrast.count} {'paired' if pair.contrast.paired else 'per group'}"
    return [*start, by, seeds, f"{pair.p:.2g}", "yes" if pair.p < LEVEL else "no"]


def table_of_runs(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    rows = []
    for run in comparison.runs:
        letter = next((group.name for group in comparison.groups if run in group.runs), NONE)
        rows.append([str(run.path), letter, _text(run.seed), run.state, run.note or NONE, _commit(run)])
    return ["folder", "runs", "seed", "state", "", "commit"], rows


def _commit(run: Run) -> str:
    commit = str(run.provenance.get("commit") or NONE)
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def table_of_settings(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    header = ["setting", *(group.letter or group.label for group in comparison.groups)]
    rows = [[d.key + (f" (+{len(d.also)})" if d.also else ""), *d.values] for d in comparison.differences]
    return header, rows


def _text(value: object) -> str:
    return NONE if value is None else str(value)


def markdown(comparison: Comparison) -> str:
    header, rows, notes = table_of_means(comparison)
    parts = ["# Comparison of runs", "\n".join(f"- {text}" for text in _sentences(comparison))]
    parts += [f"## Means\n\n{_markdown(header, rows)}"]
    parts += ["\n".join(f"[{i}] {note}  " for i, note in enumerate(notes, 1)), comparison.coverage]
    parts += [f"{title}\n\n{_markdown(*table)}" for title, table in _tables(comparison) if table[1]]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tables(comparison: Comparison) -> list[tuple[str, tuple[list[str], list[list[Cell]]]]]:
    return [
        ("## Differences between the means", table_of_pairs(comparison, headline=True)),
        ("### Other metrics", table_of_pairs(comparison, headline=False)),
        ("## Settings that differ", table_of_settings(comparison)),
        ("## Runs", table_of_runs(comparison)),
    ]


def _markdown(header: list[str], rows: list[list[Cell]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _sentences(comparison: Comparison) -> list[str]:
    if comparison.sentences:
        return comparison.sentences
    if len(comparison.groups) == 1:
        return ["These runs differ only in their seed: there is nothing to compare."]
    return ["No two of these groups of runs have a metric in common that can be ranked."]


def html(comparison: Comparison, figures: Sequence[Plot], rows: Sequence[Row], image_notes: Sequence[str]) -> str:
    """Returns the complete page."""
    header, means, notes = table_of_means(comparison)
    marks = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return Template(TEMPLATE.read_text()).substitute(
        sentences="".join(f"<li>{escape(text)}</li>" for text in _sentences(comparison)),
        coverage=escape(comparison.coverage),
        least=f"{MIN_SEEDS} seeds and {MIN_IMAGES} images",
        means=_html(header, means) + (f'<ol class="notes">{marks}</ol>' if marks else ""),
        pairs=_pairs(comparison),
        settings=_or_none(_html(*table_of_settings(comparison)), comparison.differences),
        plots="".join(map(_figure, figures)) or "<p>No run logged a curve.</p>",
        images=_images(comparison, rows, image_notes),
        runs=_html(*table_of_runs(comparison)),
        provenance="".join(_provenance(comparison)) or "<p>None recorded.</p>",
    )


def _pairs(comparison: Comparison) -> str:
    header, others = table_of_pairs(comparison, headline=False)
    folded = f"<details><summary>Other metrics</summary>{_html(header, others)}</details>" if others else ""
    header, rows = table_of_pairs(comparison, headline=True)
    return _or_none(_html(header, rows), rows) + folded


def _or_none(text: str, rows: Sequence[object]) -> str:
    return text if rows else "<p>None.</p>"


def _html(header: list[str], rows: list[list[Cell]]) -> str:
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope='row'>{escape(first)}</th>{''.join(map(_cell_html, cells))}</tr>" for first, *cells in rows
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell_html(cell: Cell) -> str:
    return f"<td{' class=long' if len(cell) > 24 else ''}>{escape(cell)}</td>"


def _figure(plot: Plot) -> str:
    source = "data:image/svg+xml;base64," + base64.b64encode(plot.svg()).decode()
    title, note = escape(plot.title), escape(plot.note)
    return f'<figure><img src="{source}" alt="{title}"><figcaption><b>{title}.</b> {note}</figcaption></figure>'


def _images(comparison: Comparison, rows: Sequence[Row], image_notes: Sequence[str]) -> str:
    notes = "".join(f"<p>{escape(note)}.</p>" for note in image_notes)
    if not rows:
        return notes
    names = [group.letter or group.label for group in comparison.groups]
    blocks = []
    for row in rows:
        cells = "".join(
            f'<figure><img src="data:image/png;base64,{base64.b64encode(image).decode()}" '
            f'alt="{escape(name)}: {escape(row.caption)}"><figcaption>{escape(name)}</figcaption></figure>'
            for name, image in zip(names, row.images, strict=True)
            if image
        )
        blocks.append(f"<section class='prompt'><p>{escape(row.caption)}</p><div class='row'>{cells}</div></section>")
    return f"{notes}<div class='prompts'>{''.join(blocks)}</div>"


def _provenance(comparison: Comparison) -> list[str]:
    return [
        f"<details><summary>{escape(str(run.path))}</summary>"
        f"<pre>{escape(json.dumps(run.provenance, indent=1, ensure_ascii=False))}</pre></details>"
        for run in comparison.runs
        if run.provenance
    ]
