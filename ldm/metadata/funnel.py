"""Counts what a filter does: rows rejected by each rule, nulls, failed coercions and histograms."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ldm.metadata.rules import DUPLICATES, Rule, Thresholds

BINS = 60


@dataclass(frozen=True)
class Axis:
    """The quantity of a histogram, in SQL over standard columns, its range and its thresholds.

    Values out of range are counted in the first or last bin.
    """

    title: str
    value: str
    columns: tuple[str, ...]
    low: float
    high: float
    cuts: tuple[float, ...]
    text: bool = False

    @property
    def bin(self) -> str:
        """SQL for the bin, 0 to BINS − 1, null for a missing value."""
        scaled = f"floor(({self.value} - {self.low}) * {BINS / (self.high - self.low)})"
        # greatest and least ignore nulls, so without this case a missing value would be counted in an end bin.
        return f"CASE WHEN ({self.value}) IS NOT NULL THEN greatest(0, least({BINS - 1}, {scaled}))::UTINYINT END"


def axes(cuts: Thresholds, active_rules: list[Rule]) -> list[Axis]:
    """Returns the histograms of all columns that are compared with a threshold."""

    def of(*values: float | None) -> tuple[float, ...]:
        return tuple(value for value in values if value is not None)

    side, aspect = "least(width, height)", "CASE WHEN width > 0 AND height > 0 THEN width / height END"
    scores = [
        Axis("aesthetic score", "aesthetic", ("aesthetic",), 1, 10, of(cuts.min_aesthetic)),
        Axis("CLIP similarity", "similarity", ("similarity",), 0, 0.6, of(cuts.min_similarity)),
        Axis("shorter side (px)", side, ("width", "height"), 0, 2048, of(cuts.min_side)),
        Axis("width / height", aspect, ("width", "height"), 0, 4, of(cuts.min_aspect, cuts.max_aspect)),
        Axis("watermark probability", "pwatermark", ("pwatermark",), 0, 1, of(cuts.max_watermark)),
        Axis("unsafe probability", "punsafe", ("punsafe",), 0, 1, of(cuts.max_unsafe)),
        Axis(
            "caption length of the rows that reach it",
            "length(caption)",
            ("caption",),
            0,
            400,
            of(cuts.min_caption, cuts.max_caption),
            text=True,
        ),
    ]
    columns = {column for rule in active_rules for column in rule.columns}
    return [axis for axis in scores if axis.cuts and columns.issuperset(axis.columns)]


@dataclass
class Tally:
    """Counts of a filter; the masks count rows by the set of rules, over numbers or over text, that they fail."""

    rows: int = 0
    number_masks: Counter[int] = field(default_factory=Counter)
    text_masks: Counter[int] = field(default_factory=Counter)
    nulls: Counter[str] = field(default_factory=Counter)
    uncoercible: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DUPLICATES, 0))

    def add(self, other: "Tally") -> None:
        """Adds the counts of another batch."""
        self.rows += other.rows
        self.number_masks.update(other.number_masks)
        self.nulls.update(other.nulls)
        self.uncoercible.update(other.uncoercible)

    def steps(self, active_rules: list[Rule]) -> list[dict[str, Any]]:
        """Returns, for each rule, the rows that it is the first to reject, the rows left, and all rows that fail it.

        The last count, `alone`, is among all rows for rules over numbers, and among the rows that pass those rules for
        rules over text.
        """
        found, left = [], self.rows
        for text, masks in ((False, self.number_masks), (True, self.text_masks)):
            for i, rule in enumerate(rule for rule in active_rules if rule.text == text):
                first = sum(n for mask, n in masks.items() if mask & ((2 << i) - 1) == 1 << i)
                left -= first
                alone = sum(n for mask, n in masks.items() if mask >> i & 1)
                found.append({"reason": rule.reason, "rejected": first, "left": left, "alone": alone})
        for reason, count in self.duplicates.items():
            left -= count
            found.append({"reason": reason, "rejected": count, "left": left, "alone": count})
        return found

    @property
    def kept(self) -> int:
        return self.text_masks[0] - sum(self.duplicates.values())
