"""Translates layer names in adapter files, which are those of diffusers and transformers, with dots or underscores.

Files contain up to three networks, which have diffusers' names here: "unet", "text_encoder" and "text_encoder_2".
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from ldm.weights.keymaps import LAYOUTS, NATIVE, TABLES, entries

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
KINDS = {UNET: "unet", TEXT: "text_tower", TEXT_2: "text_tower"}
LAYOUT = {"unet": "diffusers", "text_tower": "transformers"}
BLOCKS = 2  # per level in every UNet of Stable Diffusion; SGM numbers blocks across levels
MODEL = "text_model."  # a prefix that transformers dropped in version 5


def public_names(kind: str, config: dict[str, Any], layers: Iterable[str]) -> dict[str, str]:
    """Maps each layer name of ldm to its name in files, which is the same for networks that no other tool has."""
    tensors = [f"{layer}.weight" for layer in layers]
    layout = LAYOUT[kind] if kind in LAYOUTS else NATIVE
    found = entries(kind, layout, config, tensors)
    return {entry.ours.removesuffix(".weight"): entry.theirs.removesuffix(".weight") for entry in found}


def own_names(kind: str, config: dict[str, Any], layers: Iterable[str]) -> dict[str, str]:
    """Maps each spelling of a layer name that files may contain to the name in ldm."""
    found = {}
    for own, public in public_names(kind, config, layers).items():
        found[public] = found[underscored(public)] = own
    return found


def underscored(name: str) -> str:
    return name.replace(".", "_")


def dotted(network: str, name: str) -> str | None:
    """Converts a layer name with underscores, as in kohya's files, to one with dots; returns None if it is unknown.

    Such files use SGM's names for SDXL's UNet.
    """
    kind = KINDS[network]
    if kind == "text_tower" and not name.startswith(underscored(MODEL)):
        name = underscored(MODEL) + name
    for layout in (LAYOUT[kind], *(["compvis"] if kind == "unet" else [])):
        for pattern, template in _underscored_rows(kind, layout):
            if match := pattern.fullmatch(name):
                numbers = {word: int(digits) for word, digits in match.groupdict().items()}
                return template.format(**_levels(numbers))
    return None


def aliased(network: str, name: str) -> str:
    """Returns a dotted name as transformers wrote it before version 5."""
    return MODEL + name if KINDS[network] == "text_tower" and not name.startswith(MODEL) else name


@cache
def _underscored_rows(kind: str, layout: str) -> list[tuple[re.Pattern[str], str]]:
    """Returns patterns of a layout's layer names with underscores, each with a template of the dotted name."""
    return list(_rows(kind, 1 + LAYOUTS[kind].index(layout), 1 + LAYOUTS[kind].index(LAYOUT[kind])))


def _rows(kind: str, column: int, public: int) -> Iterator[tuple[re.Pattern[str], str]]:
    for row in TABLES[kind]:
        theirs, template = (row[index].partition(" ")[0].removesuffix(".weight") for index in (column, public))
        if not template.endswith(".bias"):
            escaped = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(underscored(theirs)))
            yield re.compile(escaped), template


def _levels(numbers: Mapping[str, int]) -> dict[str, int]:
    """Returns the numbers with SGM's block indices, which count across levels, split into level and block."""
    found = dict(numbers)
    for word in ("in", "in_last", "out", "out_last"):
        if word in numbers:
            found["level"], found["block"] = divmod(numbers[word] - word.startswith("in"), BLOCKS + 1)
    return found
