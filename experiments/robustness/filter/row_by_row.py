"""Filters rows in plain Python, one at a time, as a reference for `ldm filter` without a database or Arrow.

Values are None, numbers, or bytes for text.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np

from ldm.metadata.rules import Thresholds

SIDES = ("width", "height")
Row = Mapping[str, Any]  # maps the standard columns of the file to values


@dataclass
class Expected:
    """The positions of the kept rows, the rejected rows by reason, and the values that are no number."""

    kept: list[int] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    uncoercible: Counter[str] = field(default_factory=Counter)
    nulls: Counter[str] = field(default_factory=Counter)


def expect(rows: Sequence[Row], cuts: Thresholds, has_nsfw: bool) -> Expected:
    """Returns the result that the filter must have for the rows."""
    found, urls, normalised = Expected(), set(), set()
    for i, row in enumerate(rows):
        for name in _numeric(cuts, has_nsfw):
            found.nulls[name] += row.get(name) is None
            found.uncoercible[name] += row.get(name) is not None and number(name, row[name]) is None
        reason = _reason(row, cuts, has_nsfw)
        if reason is None and cuts.deduplicate:
            url = text(row["url"]) or ""
            reason = "duplicate_url" if url in urls else "duplicate_normalised_url" if _key(url) in normalised else None
            urls.add(url)
            normalised.add(_key(url))
        if reason is None:
            found.kept.append(i)
        else:
            found.rejected[reason] += 1
    return found


def number(name: str, value: Any) -> float | None:
    """Returns the value as a 32-bit pixel count or a finite float32 score, or None if it is neither."""
    if value is None:
        return None
    if isinstance(value, bytes):
        spelled = text(value)
        if spelled is None or not re.fullmatch(
            r"[ \t\n\v\f\r]*[+-]?(\d+(_\d+)*\.?\d*|\.\d+)(e[+-]?\d+)?[ \t\n\v\f\r]*", spelled, re.IGNORECASE | re.ASCII
        ):
            return None
        value = Decimal(spelled.strip(" \t\n\v\f\r").replace("_", ""))
    if name in SIDES:
        pixels = float(value)
        return pixels if -(2**31) - 0.5 < pixels < 2**31 - 0.5 else None
    with np.errstate(over="ignore"):
        score = float(np.float32(float(value)))
    return score if math.isfinite(score) else None


def text(value: Any) -> str | None:
    """Returns the value as text, or None if its bytes are not UTF-8."""
    if value is None:
        return None
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _numeric(cuts: Thresholds, has_nsfw: bool) -> list[str]:
    used = {
        "width": (cuts.min_side, cuts.min_aspect, cuts.max_aspect),
        "height": (cuts.min_side, cuts.min_aspect, cuts.max_aspect),
        "similarity": (cuts.min_similarity,),
        "punsafe": () if has_nsfw else (cuts.max_unsafe,),
        "pwatermark": (cuts.max_watermark,),
        "aesthetic": (cuts.min_aesthetic,),
    }
    return [name for name, values in used.items() if any(value is not None for value in values)]


def _reason(row: Row, cuts: Thresholds, has_nsfw: bool) -> str | None:
    """Returns the first rule that rejects the row, or None if it passes."""
    tests: dict[str, Callable[[], Any]] = {
        "aesthetic": lambda: _least(row, "aesthetic", cuts.min_aesthetic),
        "similarity": lambda: _least(row, "similarity", cuts.min_similarity),
        "side": lambda: cuts.min_side is None or all(_pixels(row, side) >= cuts.min_side for side in SIDES),
        "aspect": lambda: _aspect(row, cuts),
        "watermark": lambda: _below(row, "pwatermark", cuts.max_watermark),
        "nsfw": lambda: not has_nsfw or _label(row, "nsfw", cuts.nsfw),
        "unsafe": lambda: has_nsfw or _below(row, "punsafe", cuts.max_unsafe),
        "language": lambda: _label(row, "language", cuts.language),
        "url": lambda: re.match("https?://[^/]", text(row["url"]) or "", re.IGNORECASE),
        "caption_length": lambda: _length(row, cuts),
    }
    return next((reason for reason, test in tests.items() if not test()), None)


def _least(row: Row, name: str, cut: float | None) -> bool:
    score = number(name, row.get(name))
    return cut is None or (score is not None and score >= float(np.float32(cut)))


def _below(row: Row, name: str, cut: float | None) -> bool:
    score = number(name, row.get(name))
    return cut is None or (score is not None and score < float(np.float32(cut)))


def _pixels(row: Row, name: str) -> float:
    pixels = number(name, row.get(name))
    return -math.inf if pixels is None else pixels


def _aspect(row: Row, cuts: Thresholds) -> bool:
    if cuts.min_aspect is None and cuts.max_aspect is None:
        return True
    width, height = _pixels(row, "width"), _pixels(row, "height")
    if width == -math.inf or height <= 0:
        return False
    return (cuts.min_aspect or 0) <= width / height <= (math.inf if cuts.max_aspect is None else cuts.max_aspect)


def _label(row: Row, name: str, wanted: str | None) -> bool:
    label = text(row.get(name))
    return wanted is None or (label is not None and label.strip(" ").lower() == wanted.lower())


def _length(row: Row, cuts: Thresholds) -> bool:
    if cuts.min_caption is None and cuts.max_caption is None:
        return True
    caption = text(row.get("caption"))
    high = math.inf if cuts.max_caption is None else cuts.max_caption
    return caption is not None and (cuts.min_caption or 0) <= len(caption) <= high


def _key(url: str) -> str:
    """Returns the URL without the parts that do not select another image."""
    url = url.split("#")[0]
    match = re.match(r" *[A-Za-z]+://([^/? ]*)", url)
    host = match[1].lower() if match else ""
    rest = url[match.end() :] if match else url
    host = host.removeprefix("www.")
    host = host.removesuffix(":80").removesuffix(":443") if host.endswith((":80", ":443")) else host
    return host + rest.rstrip("/? ")
