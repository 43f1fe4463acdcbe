"""Which rows of a metadata table stay: an ordered list of rules, each a condition in SQL over our column names.

A row is rejected for the first rule that it fails. A null fails every rule over its column; so does what cannot be
coerced to the column's type, such as NaN, an infinity, or a width beyond 32 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DUPLICATES = ("duplicate_url", "duplicate_normalised_url")


@dataclass(frozen=True)
class Thresholds:
    """The settings of a filter; None switches a rule off. Units and senses: ldm/assets/laion_sd15_filter.yaml."""

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
    """`keep` is SQL over `columns`. A rule over text is asked only of rows that passed every rule over numbers."""

    reason: str
    keep: str
    columns: tuple[str, ...]
    text: bool = False


def rules(cuts: Thresholds, has_nsfw: bool) -> list[Rule]:
    """The rules in the order in which they are asked: cheap columns first, text last."""
    made: list[Rule] = []

    def add(
        value: float | str | None, reason: str, keep: Callable[[Any], str], *columns: str, text: bool = False
    ) -> None:
        if value is not None:
            made.append(Rule(reason, keep(value), columns, text))

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
    # Anything else that urllib opens, such as file:, would read the disk of whoever downloads.
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
    return made


def failed(asked: list[Rule]) -> str:
    """SQL: a number whose bit i is set if rule i does not hold, so 0 for a row that stays."""
    bits = [f"CASE WHEN {rule.keep} THEN 0 ELSE {1 << i} END" for i, rule in enumerate(asked)]
    return f"({' + '.join(bits) or '0'})::USMALLINT"


def all_hold(asked: list[Rule]) -> str:
    """SQL: bare comparisons, which DuckDB tests inside the parquet reader before it decodes any text."""
    return " AND ".join(f"({rule.keep})" for rule in asked) or "true"


# http is https, the host has no case, no leading www. and no default port; a fragment, an empty query, closing slashes
# and spaces around it say nothing. A query stays: it often chooses the picture.
_WHOLE = "split_part(url, '#', 1)"
_HOST = rf"lower(regexp_extract({_WHOLE}, '^ *[A-Za-z]+://([^/? ]*)', 1))"
_REST = rf"regexp_replace(regexp_replace({_WHOLE}, '^ *[A-Za-z]+://[^/? ]*', ''), '[/? ]+$', '')"
NORMALISED_URL = rf"regexp_replace({_HOST}, '^www\.|:(80|443)$', '', 'g') || {_REST}"


def quoted(text: str) -> str:
    """A string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A column name of SQL."""
    return '"' + name.replace('"', '""') + '"'


def _float(value: float) -> str:
    """Scores are stored as float32, so that a threshold of 0.7 must mean float32's 0.7."""
    return f"{value}::FLOAT"
