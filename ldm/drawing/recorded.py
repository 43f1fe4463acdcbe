"""Reads and validates the settings that sample.py stores in an image, because the file may have been edited."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ldm.image import read_metadata
from ldm.pipeline.inputs import MAX_SEED
from ldm.pipeline.limits import MAX_NUMBER
from ldm.pipeline.settings import Settings

MAX_THREADS = 1024
PRECISIONS = "auto", "32", "bf16", "16"
MAX_BATCH = 4096
# Defaults for images whose metadata lacks these settings.
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
    "lora": None,
    "embedding": None,
    "lora_dir": None,
    "lora_tags": None,
}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def _names(*keys: str) -> Callable[[Any], bool]:
    """Returns a check that a value is None or a dict with these keys and string values."""
    return lambda value: value is None or (isinstance(value, dict) and all(_is_text(value.get(key)) for key in keys))


def _files(setting: str, is_valid: Callable[[Any], bool], *texts: str) -> Callable[[Any], bool]:
    """Returns a check that a value is None or a list of files, each with the setting `setting` and these texts."""
    is_file = _names("path", "sha256", *texts)
    return lambda value: (
        value is None
        or (
            isinstance(value, list)
            and all(one is not None and is_file(one) and is_valid(one.get(setting)) for one in value)
        )
    )


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
        value is None
        or (
            isinstance(value, list)
            and len(value) == 2
            and _is_number(value[0])
            and (value[1] is None or _is_number(value[1]))
        )
    ),
    "weak": _names("model", "fingerprint"),
    "init": _names("path", "sha256"),
    "mask": _names("path", "sha256"),
    "lora": _files("weight", _is_number),
    "embedding": _files("token", _is_text),
    "lora_dir": lambda value: value is None or _is_text(value),
    "lora_tags": lambda value: (
        _files("weight", _is_number, "name")(value)
        and all(_is_number(one.get("text_weight", 0)) for one in value or [])
    ),
    "batch": lambda value: isinstance(value, dict) and _is_batch(value),
}


def read_recorded(path: str | Path) -> dict[str, Any]:
    """Returns the settings stored in an image; `LEGACY_SETTINGS` replaces those that older versions did not store.

    Raises ValueError if a setting is missing, has the wrong type, or is out of range.
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
    """Returns whether prompts, seeds and per-image values have equal lengths and the position is one of them."""
    columns: dict[str, Callable[[Any], bool]] = {"prompts": _is_text, "seeds": CHECKS["seed"]}
    columns |= {name: check for name, check in (("negative", _is_text), ("guidance", _is_number)) if name in batch}
    lists = [batch.get(name) for name in columns]
    if not all(isinstance(values, list) and 1 <= len(values) <= MAX_BATCH for values in lists):
        return False
    sizes = {len(values) for values in lists if isinstance(values, list)}
    valid = all(all(map(is_valid, batch[name])) for name, is_valid in columns.items())
    return valid and len(sizes) == 1 and _is_integer(batch.get("position"), 0, sizes.pop() - 1)
