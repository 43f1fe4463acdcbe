"""What a filter counts: rows by the rule that rejected them, nulls, coercions and histograms."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ldm.metadata.rules import DUPLICATES, Rule, Thresholds

BINS = 60


@dataclass(frozen=True)
class Axis:
    """A histogram's quantity, in SQL over our columns, its range, and its cuts. What lies outside joins the ends."""

    title: str
    value: str
    columns: tuple[str, ...]
    low: float
    high: float
    cuts: tuple[float, ...]
    text: bool = False

    @property
    def bin(self) -> str:
        """SQL: 0 to BINS − 1, null where there is no value."""
        scaled = f"floor(({self.value} - {self.low}) * {BINS / (self.high - self.low)})"
        # greatest and least pass over nulls, so that a missing value would land in an end bin.
        return f"CASE WHEN ({self.value}) IS NOT NULL THEN greatest(0, least({BINS - 1}, {scaled}))::UTINYINT END"


def axes(cuts: Thresholds, asked: list[Rule]) -> list[Axis]:
    """One for every column that a rule over numbers or over caption length asks."""

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
    columns = {column for rule in asked for column in rule.columns}
    return [axis for axis in scores if axis.cuts and columns.issuperset(axis.columns)]


@dataclass
class Tally:
    """Counts that only ever grow. `masks` holds the rows by the set of rules over numbers, or over text, they fail."""

    rows: int = 0
    number_masks: Counter[int] = field(default_factory=Counter)
    text_masks: Counter[int] = field(default_factory=Counter)
    nulls: Counter[str] = field(default_factory=Counter)
    uncoercible: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DUPLICATES, 0))

    def add(self, other: "Tally") -> None:
        """The counts of one more batch."""
        self.rows += other.rows
        self.number_masks.update(other.number_masks)
        self.nulls.update(other.nulls)
        self.uncoercible.update(other.uncoercible)

    def steps(self, asked: list[Rule]) -> list[dict[str, Any]]:
        """Rule by rule: the rows that it was the first to reject, those left, and those that fail it at all.

        `alone` counts among all rows for a rule over numbers, among the rows that reach the text for one over text.
        """
        found, left = [], self.rows
        for text, masks in ((False, self.number_masks), (True, self.text_masks)):
            for i, rule in enumerate(rule for rule in asked if rule.text == text):
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
