"""Reads the rules and columns of `ldm filter` from a preset or a file, overridden by the command line.

The file of a preset has one key for each threshold. Three more are optional: `columns` maps standard names to those of
the data set, `header` names the columns of a csv or tsv without a header row, and `known_by` lists columns by which the
data set is recognised.
"""

import argparse
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import UsageError
from ldm.metadata.columns import parse_choices
from ldm.metadata.rules import Thresholds

ASSETS = Path(__file__).parents[2] / "assets"
DEFAULT = "laion_sd15"
MAX_NUMBER = 1e9
TEXT_RULES = ("nsfw", "language", "caption_match", "caption_exclude")
OPTIONAL = ("columns", "header", "known_by")


@dataclass(frozen=True)
class Recipe:
    """The rules and column names of a preset, or of a file in the same format."""

    thresholds: Thresholds
    columns: dict[str, str]
    header: list[str] | None


def presets() -> list[str]:
    return sorted(path.name.removesuffix("_filter.yaml") for path in ASSETS.glob("*_filter.yaml"))


def path_of(preset: str) -> Path:
    return ASSETS / f"{preset}_filter.yaml"


def recognised(found: Collection[str]) -> str | None:
    """Returns the preset that recognises these columns, the one with the most columns."""
    known = {preset: _mapping(path_of(preset)).get("known_by", ()) for preset in presets()}
    matches = [preset for preset, columns in known.items() if columns and {*columns} <= {*found}]
    return max(matches, key=lambda preset: len(known[preset]), default=None)


def read(args: argparse.Namespace) -> Recipe:
    """Returns the recipe of the command line. Raises UsageError if it is invalid."""
    path = args.config or path_of(args.preset)
    config = _mapping(path)
    header = args.header.split(",") if args.header else config.get("header")
    columns = config.get("columns") or {}
    try:
        chosen = parse_choices(f"{name}={column}" for name, column in columns.items())
    except (ValueError, AttributeError) as error:
        raise UsageError(f"columns of {path}: expected standard names and columns ({error})") from error
    if header is not None and not (isinstance(header, list) and all(isinstance(n, str) and n for n in header)):
        raise UsageError(f"header={header}: expected the names of the columns, such as url,caption")
    return Recipe(thresholds(args, config, path), chosen, header)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def thresholds(args: argparse.Namespace, config: dict[str, Any], path: Path) -> Thresholds:
    """Returns the rules of the file, overridden by the command line. Raises UsageError for invalid rules."""
    names = [field.name for field in fields(Thresholds)]
    if problems := [f"lacks {name}" for name in names if name not in config] or sorted(
        f"has {key}" for key in config.keys() - {*names, *OPTIONAL}
    ):
        raise UsageError(
            f"--config {path} {', '.join(problems)}: it must have the keys of {path_of(DEFAULT).name}, and may have "
            f"{', '.join(OPTIONAL)}"
        )
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    cuts = Thresholds(**{name: _value(name, given.get(name, config[name])) for name in names})
    for name in ("aspect", "caption"):
        least, most = getattr(cuts, f"min_{name}"), getattr(cuts, f"max_{name}")
        if least is not None and most is not None and least > most:
            raise UsageError(
                f"min_{name}={least} is more than max_{name}={most}, so no row would be kept: change one of them"
            )
    return cuts


def _value(name: str, value: Any) -> Any:
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if name == "deduplicate":
            raise UsageError(f"{name}={value}: expected true or false")
        return None
    if name in TEXT_RULES:
        return str(value)
    if name == "deduplicate":
        if str(value).lower() not in ("true", "false"):
            raise UsageError(f"{name}={value}: expected true or false")
        return str(value).lower() == "true"
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}={value}: expected a number or none") from error
    if not abs(number) < MAX_NUMBER:
        raise UsageError(f"{name}={value}: expected a finite number below {MAX_NUMBER:g} or none")
    return int(number) if number.is_integer() else number
