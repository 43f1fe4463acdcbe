"""Renders a comparison as one self-contained HTML page, and as Markdown."""

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from ldm.metrics.sample_sizes import MIN_IMAGES, MIN_SEEDS
from ldm.report.comparison import Comparison, GroupPair, listed
from ldm.report.figures import COLORS, Plot
from ldm.report.groups import Group, described
from ldm.report.images import Row
from ldm.report.metric import ARROWS, Metric
from ldm.report.runs import Run
from ldm.report.statistics import LEVEL

TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html"
Cell = str
NONE = "–"
MANY = 6  # the most groups that a table has as columns, and runs that a sentence names
SHOWN = 4  # prompts whose images are shown without unfolding the rest


def table_of_means(comparison: Comparison, main: bool) -> tuple[list[str], list[list[Cell]], list[str]]:
    """Returns the header, a row per metric with a column per group, and the notes that the marks [1], [2] … refer to.

    The main metrics are those of generated images and of the validation. Many groups have rows instead of columns.
    """
    metrics = [metric for metric in comparison.metrics if metric.main == main]
    notes: list[str] = []
    rows = []
    for metric in metrics:
        cells = [_cell(comparison, metric, index, notes) for index in range(len(comparison.groups))]
        rows.append([metric.title + ARROWS[metric.better], *cells])
    table = [["", *(group.short for group in comparison.groups)], *rows]
    if len(comparison.groups) > MANY and rows:
        table = [list(cells) for cells in zip(*table, strict=True)]
    return table[0], table[1:] if rows else [], notes


def _cell(comparison: Comparison, metric: Metric, index: int, notes: list[str]) -> Cell:
    mean = comparison.means[metric.key][index]
    if mean is None:
        return NONE
    text = metric.write(mean.value, mean.half)
    reasons = comparison.not_comparable[metric.key][index]
    found = [f"not comparable with the first value of the row: {'; '.join(reasons)}"] if reasons else []
    found += comparison.warnings(metric.key, index)
    notes += [note for note in found if note not in notes]
    return " ".join([text, *(f"[{number}]" for number in sorted(notes.index(note) + 1 for note in found))])


def table_of_pairs(comparison: Comparison, headline: bool) -> tuple[list[str], list[list[Cell]]]:
    """Returns the header and the rows of the pairs by the headline metrics, or by the others."""
    header = ["metric", "better", "than", "difference", "seeds", "p (Holm)", "shown?"]
    return header, [_pair(pair, comparison) for pair in comparison.pairs if pair.metric.headline == headline]


def _pair(pair: GroupPair, comparison: Comparison) -> list[Cell]:
    a, b = (comparison.groups[i] for i in (pair.a, pair.b))
    start = [pair.metric.title, a.short, b.short]
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
        letter = next((group.short for group in comparison.groups if run in group.runs), NONE)
        rows.append([str(run.path), letter, _text(run.seed), run.state, run.note or NONE, _commit(run)])
    return ["folder", "runs", "seed", "state", "", "commit"], rows


def _commit(run: Run) -> str:
    commit = str(run.provenance.get("commit") or NONE)
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def table_of_settings(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    header = ["setting", *(group.short for group in comparison.groups)]
    rows = [[d.key + (f" (+{len(d.also)})" if d.also else ""), *d.values] for d in comparison.differences]
    return header, rows


def _text(value: object) -> str:
    return NONE if value is None else str(value)


def legend(comparison: Comparison) -> list[tuple[str, str]]:
    """Returns each group's letter, and its settings that differ with its seeds."""
    lines = []
    for index, group in enumerate(comparison.groups):
        about = [described(comparison.differences, index) if group.letter else "", _seeds(group)]
        lines.append((group.short, "; ".join(text for text in about if text)))
    return lines


def _seeds(group: Group) -> str:
    """Returns the seeds of a group's runs and, if their evaluations differ in it, the seeds of the noise."""
    seeds = list(dict.fromkeys(str(run.seed) for run in group.runs if run.seed is not None))
    noises = list(dict.fromkeys(str(run.noise) for run in group.runs if run.noise is not None))
    texts = [f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"] if seeds else []
    return "; ".join(texts + ([f"noise {', '.join(noises)}"] if len(noises) > 1 else []))


def conclusions(comparison: Comparison) -> list[str]:
    """Returns what the comparison shows, and which runs have nothing to compare."""
    return [*_sentences(comparison), *_not_evaluated(comparison)]


def _not_evaluated(comparison: Comparison) -> list[str]:
    runs = comparison.not_evaluated
    names = [
        str(run.path) + (f" ({group.letter})" if group.letter else "")
        for group in comparison.groups
        for run in group.runs
        if run in runs
    ]
    if not names:
        return []
    if len(names) == sum(len(group.runs) for group in comparison.groups) > 1:
        text = "None of these runs was"
    else:
        shown = names if len(names) <= MANY else [*names[:MANY], f"{len(names) - MANY} more"]
        text = f"{listed(shown)} {'were' if len(names) > 1 else 'was'} never"
    return [f"{text} evaluated on generated images: run ldm evaluate RUN --data DATA --out FILE."]


def markdown(comparison: Comparison) -> str:
    header, rows, notes = table_of_means(comparison, main=True)
    parts = ["# Comparison of runs", "\n".join(f"- **{name}**: {text}" for name, text in legend(comparison))]
    parts += ["\n".join(f"- {text}" for text in conclusions(comparison))]
    parts += [f"## Means\n\n{_markdown(header, rows)}" if rows else ""]
    parts += ["\n".join(f"[{i}] {note}  " for i, note in enumerate(notes, 1)), comparison.coverage]
    parts += [f"{title}\n\n{_markdown(*table)}" for title, table in _tables(comparison) if table[1]]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tables(comparison: Comparison) -> list[tuple[str, tuple[list[str], list[list[Cell]]]]]:
    return [
        ("## Other metrics", table_of_means(comparison, main=False)[:2]),
        ("## Differences between the means", table_of_pairs(comparison, headline=True)),
        ("### By other metrics", table_of_pairs(comparison, headline=False)),
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
        one = len(comparison.groups[0].runs) == 1
        return [f"{'This is one run' if one else 'These runs differ only in their seed'}: there is nothing to compare."]
    return ["No two of these groups of runs have a metric in common that can be ranked."]


def html(comparison: Comparison, figures: Sequence[Plot], rows: Sequence[Row], image_notes: Sequence[str]) -> str:
    """Returns the complete page."""
    charts = [plot for plot in figures if plot.lettered]
    return Template(TEMPLATE.read_text()).substitute(
        columns=len(comparison.groups),
        legend="".join(
            f"<li>{_letter(i, name)} {escape(text)}</li>" for i, (name, text) in enumerate(legend(comparison))
        ),
        images=_images(comparison, rows, image_notes),
        chart="".join(map(_figure, charts)),
        sentences="".join(f"<li>{escape(text)}</li>" for text in conclusions(comparison)),
        coverage=escape(comparison.coverage),
        means=_means(comparison, main=True) or "<p>No run has a metric of generated images or a validation.</p>",
        others=_folded("Other metrics", _means(comparison, main=False)),
        least=f"{MIN_SEEDS} seeds and {MIN_IMAGES} images",
        pairs=_pairs(comparison),
        settings=_or_none(_html(*table_of_settings(comparison)), comparison.differences),
        plots="".join(_figure(plot) for plot in figures if not plot.lettered) or "<p>No run logged a curve.</p>",
        runs=_html(*table_of_runs(comparison)),
        provenance="".join(_provenance(comparison)) or "<p>None recorded.</p>",
    )


def _letter(index: int, name: str) -> str:
    """Returns a group's name, underlined in its color in the plots."""
    return f'<b class="letter" style="border-color:{COLORS[index % len(COLORS)]}">{escape(name)}</b>'


def _means(comparison: Comparison, main: bool) -> str:
    header, rows, notes = table_of_means(comparison, main)
    marks = "".join(f"<li>{escape(note)}</li>" for note in notes)
    table = f'<div class="means">{_html(header, rows)}</div>' if rows else ""
    return table + (f'<ol class="notes">{marks}</ol>' if marks else "")


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def _pairs(comparison: Comparison) -> str:
    header, others = table_of_pairs(comparison, headline=False)
    folded = _folded("By other metrics", _html(header, others) if others else "")
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
    """Returns a grid with a column for each group that has images and a row for each prompt; most rows are folded."""
    notes = "".join(f'<p class="soft">{escape(note)}.</p>' for note in image_notes)
    if not rows:
        return notes
    chosen = [k for k in range(len(comparison.groups)) if any(row.images[k] for row in rows)]
    names = [comparison.groups[k].short for k in chosen]
    heads = "".join(f"<div>{_letter(k, name)}</div>" for k, name in zip(chosen, names, strict=True))
    blocks = [_row(row, chosen, names) for row in rows]
    head = f"<div class='line'><p></p><div class='row'>{heads}</div></div>"
    grid = f"<div class='prompts' style='--columns:{len(chosen)}'>{head}"
    more = f"{len(rows) - SHOWN} more prompts"
    folded = _folded(more, f"{grid}{''.join(blocks[SHOWN:])}</div>" if len(rows) > SHOWN else "")
    return f"{grid}{''.join(blocks[:SHOWN])}</div>{folded}{notes}"


def _row(row: Row, chosen: Sequence[int], names: Sequence[str]) -> str:
    cells = "".join(_image(row.images[k], f"{name}: {row.caption}") for k, name in zip(chosen, names, strict=True))
    return f"<div class='line'><p>{escape(row.caption)}</p><div class='row'>{cells}</div></div>"


def _image(image: bytes | None, text: str) -> str:
    if image is None:
        return "<div></div>"
    return f'<div><img src="data:image/png;base64,{base64.b64encode(image).decode()}" alt="{escape(text)}"></div>'


def _provenance(comparison: Comparison) -> list[str]:
    return [
        f"<details><summary>{escape(str(run.path))}</summary>"
        f"<pre>{escape(json.dumps(run.provenance, indent=1, ensure_ascii=False))}</pre></details>"
        for run in comparison.runs
        if run.provenance
    ]
