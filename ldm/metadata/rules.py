"""Defines the rules that rows of metadata must pass, an ordered list of SQL conditions over standard column names.

A row is rejected by the first rule that it fails. A null fails every rule over its column, and so does a value that
cannot be coerced to the column's type, such as NaN, infinity, or a width beyond 32 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DUPLICATES = ("duplicate_url", "duplicate_normalised_url")


@dataclass(frozen=True)
class Thresholds:
    """The settings of a filter; None disables a rule. Units and directions: ldm/assets/laion_sd15_filter.yaml."""

    min_aesthetic: float | None
    min_similarity: float | None
    min_side: float | None
    min_aspect: float | None
    max_aspect: float | None
    max_watermark: float | None
    nsfw: str | None
    max_unsafe: float | None
    language: str | None
    min_caption: int | None
    max_caption: int | None
    caption_match: str | None
    caption_exclude: str | None
    deduplicate: bool


@dataclass(frozen=True)
class Rule:
    """A rule with `keep` as SQL over `columns`. Rules over text apply only to rows that pass all rules over numbers."""

    reason: str
    keep: str
    columns: tuple[str, ...]
    text: bool = False


def rules(cuts: Thresholds, has_nsfw: bool) -> list[Rule]:
    """Returns the rules in the order in which they apply: cheap columns first, text last."""
    active: list[Rule] = []

    def add(
        value: float | str | None, reason: str, keep: Callable[[Any], str], *columns: str, text: bool = False
    ) -> None:
        if value is not None:
            active.append(Rule(reason, keep(value), columns, text))

    add(cuts.min_aesthetic, "aesthetic", lambda v: f"aesthetic >= {_float(v)}", "aesthetic")
    add(cuts.min_similarity, "similarity", lambda v: f"similarity >= {_float(v)}", "similarity")
    add(cuts.min_side, "side", lambda v: f"width >= {v} AND height >= {v}", "width", "height")
    if cuts.min_aspect is not None or cuts.max_aspect is not None:
        low, high = cuts.min_aspect or 0, cuts.max_aspect or "'inf'::DOUBLE"
        add("on", "aspect", lambda _: f"height > 0 AND width / height BETWEEN {low} AND {high}", "width", "height")
    add(cuts.max_watermark, "watermark", lambda v: f"pwatermark < {_float(v)}", "pwatermark")
    if has_nsfw:
        add(cuts.nsfw, "nsfw", lambda v: f"upper(trim(nsfw)) = upper({quoted(v)})", "nsfw")
    else:
        add(cuts.max_unsafe, "unsafe", lambda v: f"punsafe < {_float(v)}", "punsafe")
    add(cuts.language, "language", lambda v: f"lower(trim(language)) = lower({quoted(v)})", "language")
    # Other protocols that urllib opens, such as file:, would read the disk of the machine that downloads.
    add("on", "url", lambda _: "regexp_matches(url, '^https?://[^/]', 'i')", "url", text=True)
    if cuts.min_caption is not None or cuts.max_caption is not None:
        low, high = cuts.min_caption or 0, cuts.max_caption or 2**31
        add("on", "caption_length", lambda _: f"length(caption) BETWEEN {low} AND {high}", "caption", text=True)
    add(cuts.caption_match, "caption_match", lambda v: f"regexp_matches(caption, {quoted(v)})", "caption", text=True)
    add(
        cuts.caption_exclude,
        "caption_exclude",
        lambda v: f"NOT regexp_matches(caption, {quoted(v)})",
        "caption",
        text=True,
    )
    return active


def failure_mask(active_rules: list[Rule]) -> str:
    """Returns SQL for a number whose bit i is set if rule i does not hold, so 0 for a row that passes."""
    bits = [f"CASE WHEN {rule.keep} THEN 0 ELSE {1 << i} END" for i, rule in enumerate(active_rules)]
    return f"({' + '.join(bits) or '0'})::USMALLINT"


def all_hold(active_rules: list[Rule]) -> str:
    """Returns SQL of plain comparisons, which DuckDB evaluates in the parquet reader before it decodes text."""
    return " AND ".join(f"({rule.keep})" for rule in active_rules) or "true"


# Ignores the difference between http and https, the case of the host, a leading www., default ports, fragments, empty
# queries, trailing slashes and surrounding spaces. Keeps the query, because it often selects the image.
_WITHOUT_FRAGMENT = "split_part(url, '#', 1)"
_HOST = rf"lower(regexp_extract({_WITHOUT_FRAGMENT}, '^ *[A-Za-z]+://([^/? ]*)', 1))"
_REST = rf"regexp_replace(regexp_replace({_WITHOUT_FRAGMENT}, '^ *[A-Za-z]+://[^/? ]*', ''), '[/? ]+$', '')"
NORMALISED_URL = rf"regexp_replace({_HOST}, '^www\.|:(80|443)$', '', 'g') || {_REST}"


def quoted(text: str) -> str:
    """Returns the text as an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def _float(value: float) -> str:
    """Returns the value as float32, because scores are float32 and 0.7 must equal the float32 of 0.7."""
    return f"{value}::FLOAT"
