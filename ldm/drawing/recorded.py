"""Reads the settings that an image of sample.py records, and checks each, because the file may have been edited."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ldm.image import read_metadata
from ldm.pipeline.inputs import MAX_SEED
from ldm.pipeline.settings import MAX_NUMBER, Settings

MAX_THREADS = 1024
PRECISIONS = "auto", "32", "bf16", "16"
MAX_BATCH = 4096
# The settings of images whose metadata does not record these.
LEGACY_SETTINGS: dict[str, Any] = {
    "fixed_steps": False,
    "sampler_options": {},
    "spacing_options": {},
    "final_sigma": "zero",
    "guidance_interval": None,
    "guidance_rescale": 0.0,
    "thresholding": "none",
    "thresholding_options": {},
    "clip_skip": 0,
    "chunks": 1,
    "prompt_syntax": "plain",
    "tile": 0,
    "noise": "ldm",
    "strength": None,
    "weak": None,
    "compile": False,
    "init": None,
    "mask": None,
}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def _names(*keys: str) -> Callable[[Any], bool]:
    """Whether a value is None or has these keys, each with text."""
    return lambda value: value is None or (isinstance(value, dict) and all(_is_text(value.get(key)) for key in keys))


CHECKS: dict[str, Callable[[Any], bool]] = {
    "prompt": _is_text,
    "negative": _is_text,
    "seed": lambda value: _is_integer(value, 0, MAX_SEED),
    "model": _is_text,
    "fingerprint": _is_text,
    "device": _is_text,
    "precision": lambda value: value in PRECISIONS,
    "threads": lambda value: _is_integer(value, 1, MAX_THREADS),
    "compile": lambda value: isinstance(value, bool),
    "strength": lambda value: value is None or _is_number(value),
    "guidance_interval": lambda value: (
        value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)))
    ),
    "weak": _names("model", "fingerprint"),
    "init": _names("path", "sha256"),
    "mask": _names("path", "sha256"),
    "batch": lambda value: isinstance(value, dict) and _is_batch(value),
}


def read_recorded(path: str | Path) -> dict[str, Any]:
    """Returns the settings of an image, with `LEGACY_SETTINGS` for those that it does not record.

    Raises ValueError for a file that lacks a setting, or has one of the wrong type or out of range.
    """
    recorded = LEGACY_SETTINGS | read_metadata(path)
    settings: dict[str, Any] = {setting.name: recorded.get(setting.name) for setting in fields(Settings)}
    if missing := sorted((CHECKS.keys() | settings.keys()) - recorded.keys()):
        raise ValueError(f"{path} lacks settings of sample.py ({', '.join(missing)}); give an image that it wrote")
    if wrong := [name for name, is_valid in CHECKS.items() if not is_valid(recorded[name])]:
        raise ValueError(
            f"{path} has invalid settings of sample.py ({', '.join(wrong)}): it was edited; give an image as written"
        )
    try:
        Settings(**settings)
    except ValueError as error:
        raise ValueError(f"{path} has invalid settings of sample.py: {error}") from error
    return recorded


def _is_batch(batch: dict[str, Any]) -> bool:
    """Whether it lists as many prompts as seeds, and values that differ between images, and names one position."""
    columns: dict[str, Callable[[Any], bool]] = {"prompts": _is_text, "seeds": CHECKS["seed"]}
    columns |= {name: check for name, check in (("negative", _is_text), ("guidance", _is_number)) if name in batch}
    lists = [batch.get(name) for name in columns]
    if not all(isinstance(values, list) and 1 <= len(values) <= MAX_BATCH for values in lists):
        return False
    sizes = {len(values) for values in lists if isinstance(values, list)}
    valid = all(all(map(is_valid, batch[name])) for name, is_valid in columns.items())
    return valid and len(sizes) == 1 and _is_integer(batch.get("position"), 0, sizes.pop() - 1)
