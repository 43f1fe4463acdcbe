import io
from collections import Counter

from PIL import Image

from ldm.metadata.funnel import BINS, Tally
from ldm.metadata.funnel_figure import draw, save
from ldm.metadata.rules import Rule

RULES = [Rule("a", "", ("x",)), Rule("b", "", ("y",)), Rule("c", "", ("t",), text=True)]


def tally() -> Tally:
    """Counts of 100 rows: 40 fail a, 30 fail b, 10 fail both; 15 of the 40 left fail c; 5 are duplicates."""
    counts = Tally(100, Counter({0b00: 40, 0b01: 30, 0b10: 20, 0b11: 10}), Counter({0: 25, 1: 15}))
    counts.duplicates["duplicate_url"] = 5
    return counts


def test_every_row_is_either_kept_or_rejected_once() -> None:
    steps = tally().steps(RULES)
    assert [(s["reason"], s["rejected"], s["left"], s["alone"]) for s in steps[:4]] == [
        ("a", 40, 60, 40), ("b", 20, 40, 30), ("c", 15, 25, 15), ("duplicate_url", 5, 20, 5)
    ]  # fmt: skip
    assert steps[-1]["left"] == tally().kept == 20


def test_counts_of_two_batches_are_added() -> None:
    first, second = (Tally(3, Counter({0: 3}), nulls=Counter(x=1)) for _ in range(2))
    first.add(second)
    assert first.rows == 6 and first.number_masks == {0: 6} and first.nulls == {"x": 2}


def test_the_figure_has_a_funnel_of_the_counts_and_all_histograms() -> None:
    histogram = {"low": 0.0, "high": 1.0, "cuts": [0.5], "counts": [1] * BINS}
    figure = draw(tally().steps(RULES), 100, {"x": histogram, "y": histogram})
    funnel, *histograms = figure.axes
    assert [bar.get_width() for bar in funnel.containers[0]] == [100, 60, 40, 25, 20, 20]
    assert [line.get_xdata()[0] for line in histograms[0].lines] == [0.5] and len(histograms) == 2
    file = io.BytesIO()
    save(figure, file)
    assert Image.open(file).format == "PNG"
