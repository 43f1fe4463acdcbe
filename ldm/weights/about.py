"""Reads and validates the metadata that ldm stores in its files beside the tensors, as plain data."""

import json
from collections.abc import Iterator
from typing import Any

from ldm.weights.kinds import ADAPTER
from ldm.weights.storage.tensors import Tensors

Types = dict[str, type | tuple[type, ...]]
ABOUT: Types = {
    **{"kind": str, "config": dict, "configs": dict, "model": dict, "pixels": dict, "pad": int, "base": dict},
    "modules": list,  # layers that an adapter in kohya's layout changes
}
BASE: Types = {"weights": str, "fingerprint": str, "network": dict}  # the network that an adapter changes
FROZEN: Types = {"weights": str, "fingerprint": str}  # a part that is not in the file
MODEL: Types = {
    "time": (str, type(None)),
    "schedule": dict,
    "prediction": str,
    "size": (list, tuple),
    "sampling": dict,
}  # how to sample


def about_of(tensors: Tensors) -> dict[str, Any]:
    """Returns ldm's metadata of a file, empty if it was not written by ldm. Raises ValueError if it is corrupt."""
    stored = tensors.metadata.get("ldm", {})
    try:
        about = dict(json.loads(stored) if isinstance(stored, str) else stored)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the metadata of {tensors.source} is corrupt; download or export it again") from error
    if corrupt := sorted(_wrong("", about, ABOUT, required=False)) or sorted(_wrong_inside(about)):
        raise ValueError(
            f"the metadata of {tensors.source} is corrupt or incomplete ({', '.join(corrupt)}); export it again"
        )
    return about


def _wrong(name: str, values: Any, types: Types, required: bool = True) -> Iterator[str]:
    """Yields the names of values that have the wrong type, or are missing although `required`."""
    members = values if isinstance(values, dict) else {}
    for key, kind in types.items():
        if (required or key in members) and not isinstance(members.get(key), kind):
            yield f"{name}{key}"


def _wrong_inside(about: dict[str, Any]) -> Iterator[str]:
    for kind, config in about.get("configs", {}).items():
        if not isinstance(config, dict):
            yield f"configs.{kind}"
    if about.get("kind") == ADAPTER:
        yield from _wrong("base.", about.get("base"), BASE)
    if "pixels" in about and not _are_pixels(about["pixels"]):
        yield "pixels"
    if model := about.get("model"):
        yield from _wrong("model.", model, MODEL)
        size = model.get("size")
        if isinstance(size, list | tuple) and [type(side) for side in size] != [int, int]:
            yield "model.size"
        for part in ("first_stage", "text_encoder"):
            if part in model:
                yield from _wrong(f"model.{part}.", model[part], FROZEN)


def _are_pixels(values: dict[str, Any]) -> bool:
    """Returns whether mean and standard deviation each have three numbers, one per channel."""
    stats = [values.get("mean"), values.get("std")]
    return len(values) == 2 and all(
        isinstance(each, list | tuple) and len(each) == 3 and all(isinstance(value, int | float) for value in each)
        for each in stats
    )
