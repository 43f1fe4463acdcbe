"""Names of layers in files of adapters: those of diffusers and transformers, with dots or with underscores.

Files know three networks, here called by diffusers' names for them: "unet", "text_encoder" and "text_encoder_2".
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from ldm.weights.keymaps import LAYOUTS, NATIVE, TABLES, entries

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
KINDS = {UNET: "unet", TEXT: "text_tower", TEXT_2: "text_tower"}
LAYOUT = {"unet": "diffusers", "text_tower": "transformers"}
BLOCKS = 2  # of each level in every UNet of Stable Diffusion, which SGM's names count through
MODEL = "text_model."  # which transformers left out of its names in version 5


def public_names(kind: str, config: dict[str, Any], layers: Iterable[str]) -> dict[str, str]:
    """For each layer of a network of ours its name in files, which is our own for a network that no other tool has."""
    tensors = [f"{layer}.weight" for layer in layers]
    layout = LAYOUT[kind] if kind in LAYOUTS else NATIVE
    found = entries(kind, layout, config, tensors)
    return {entry.ours.removesuffix(".weight"): entry.theirs.removesuffix(".weight") for entry in found}


def own_names(kind: str, config: dict[str, Any], layers: Iterable[str]) -> dict[str, str]:
    """For each spelling that a file may have of a layer of ours its name."""
    found = {}
    for own, public in public_names(kind, config, layers).items():
        found[public] = found[underscored(public)] = own
    return found


def underscored(name: str) -> str:
    return name.replace(".", "_")


def dotted(network: str, name: str) -> str | None:
    """A layer's name with dots, of one with underscores as kohya's files have it; None where it is unknown.

    SDXL's UNet has SGM's names in such files.
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
    """A dotted name as transformers wrote it until version 5."""
    return MODEL + name if KINDS[network] == "text_tower" and not name.startswith(MODEL) else name


@cache
def _underscored_rows(kind: str, layout: str) -> list[tuple[re.Pattern[str], str]]:
    """Patterns of a layout's layers with underscores, and the dotted name that each stands for."""
    return list(_rows(kind, 1 + LAYOUTS[kind].index(layout), 1 + LAYOUTS[kind].index(LAYOUT[kind])))


def _rows(kind: str, column: int, public: int) -> Iterator[tuple[re.Pattern[str], str]]:
    for row in TABLES[kind]:
        theirs, template = (row[index].partition(" ")[0].removesuffix(".weight") for index in (column, public))
        if not template.endswith(".bias"):
            escaped = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(underscored(theirs)))
            yield re.compile(escaped), template


def _levels(numbers: Mapping[str, int]) -> dict[str, int]:
    """The level and the block of those that SGM counts through all levels."""
    found = dict(numbers)
    for word in ("in", "in_last", "out", "out_last"):
        if word in numbers:
            found["level"], found["block"] = divmod(numbers[word] - word.startswith("in"), BLOCKS + 1)
    return found
