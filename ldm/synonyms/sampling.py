"""Translates names of settings and samplers that other programs use for sampling, with a note on each."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.synonyms.table import SAMPLERS, SPACINGS, Instead, Same
from ldm.weights.diffusers.fields import Given
from ldm.weights.diffusers.samplers import SAMPLERS as BY_CLASS
from ldm.weights.diffusers.samplers import sampler_from

CLASSES = {name for name, _ in BY_CLASS.values()}


def translate(
    given: Mapping[str, Any], table: Mapping[str, Same | Instead], size: tuple[int, int] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Returns the settings with the names and samplers of ldm, and a note for each that was translated.

    `size` completes a height that is given without a width, or the reverse. Raises ValueError for a setting that is
    given twice, by two names, and for one that has no counterpart of the same meaning.
    """
    settings = {name: value for name, value in given.items() if name not in table}
    notes = []
    for name, value in given.items():
        if (found := table.get(name)) is None:
            continue
        if isinstance(found, Instead):
            raise ValueError(f"{name} is not a setting: give {found}")
        if found.ours in settings:
            raise ValueError(f"{found.ours} and {name}, which mean the same, are both given: leave out {name}")
        settings[found.ours] = found.convert(value)
        if found.ours not in (name, "sampler", "height", "width"):
            notes.append(f"{name}={value} is taken as {found.ours}={settings[found.ours]}")
    settings, more = _with_sampler(settings)
    settings, last = _with_size(settings, size)
    return settings, notes + more + last


def _with_sampler(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Replaces the name of a sampler or a spacing of another program; given options take precedence over its own."""
    name = settings.get("sampler")
    if not isinstance(name, str) or not (meant := sampler_settings(name)):
        return settings, []
    spacing = settings.get("spacing")
    if "spacing" in meant and spacing not in (None, meant["spacing"]):
        raise ValueError(f"sampler={name} means spacing={meant['spacing']}, but spacing={spacing} is given, too")
    options = meant.get("sampler_options", {}) | dict(settings.get("sampler_options") or {})
    kept = {key: value for key, value in settings.items() if key != "sampler"}
    merged = kept | meant | ({"sampler_options": options} if options else {})
    return merged, [f"sampler={name} is taken as {as_words(meant)}"]


def _with_size(settings: dict[str, Any], size: tuple[int, int] | None) -> tuple[dict[str, Any], list[str]]:
    """Replaces a height and a width by a size."""
    sides = {side: settings.pop(side) for side in ("height", "width") if settings.get(side) is not None}
    if not sides:
        return settings, []
    given = " ".join(f"{side}={length}" for side, length in sides.items())
    if settings.get("size") is not None:
        raise ValueError(f"{given} and size, which mean the same, are both given: leave out one")
    if size is None and len(sides) == 1:
        raise ValueError(f"{given} is given alone: give both height and width, or size=HEIGHTxWIDTH")
    height, width = (sides.get(side, own) for side, own in zip(("height", "width"), size or (0, 0), strict=True))
    return settings | {"size": (height, width)}, [f"{given} is taken as size={height}x{width}"]


def sampler_settings(name: str) -> dict[str, Any]:
    """Returns the settings for a sampler of another program, such as DPM++ 2M Karras or DDIMScheduler.

    The result is empty for names of ldm and for unknown names, and holds only a spacing for the name of a spacing.
    """
    if name in CLASSES:
        return sampler_from(name, Given({}, Path(name)))
    if name in BY_CLASS:
        return {}
    words = re.sub(r"[\s_]+", "_", name.strip().lower().replace("+", "p"))
    for spacing in SPACINGS:
        if words == spacing:
            return {"spacing": spacing}
        if words.endswith(f"_{spacing}") and (solver := words.removesuffix(f"_{spacing}")) in SAMPLERS:
            return SAMPLERS[solver] | {"spacing": spacing}
    return SAMPLERS.get(words, {})


def as_words(settings: Mapping[str, Any]) -> str:
    """Returns settings as they are written on the command line of sample.py."""
    return " ".join(f"{key}={_text(value)}" for key, value in settings.items())


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{name}={_text(option)}" for name, option in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)
