"""Restores the controls of the page from the settings in a PNG, which is untrusted input."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ldm.drawing.job import CALL_KEYS
from ldm.drawing.sources import CALL_NAMES, read_recorded
from ldm.image import read_metadata
from ldm.sampling.driver import SAMPLERS
from ldm.sampling.spacing import SPACINGS

# Controls whose value is the recorded setting, with a value of its type.
DIRECT = {"prompt": "", "negative": "", "sampler": "", "spacing": "", "seed": 0, "steps": 0, "guidance": 0.0}


@dataclass(frozen=True)
class Restored:
    """Values of controls by name, arguments of a pipeline's call, source images, and warnings about missing ones."""

    controls: dict[str, Any]
    call: dict[str, Any]
    sources: dict[str, Image] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def restore(png: Path, models: Mapping[str, str], folder: Path) -> Restored:
    """Reads the settings of a PNG, and its source image and mask only if they are in `folder`.

    Raises ValueError if settings are missing or have the wrong type.
    """
    record = read_metadata(png)
    if not _is_valid(record):
        raise ValueError(f"{png.name} lacks settings of an image sampled by ldm; choose a PNG written by ldm")
    height, width = record["size"]
    controls = {name: record[name] for name in DIRECT} | {"height": height, "width": width, "count": 1}
    if isinstance(record.get("strength"), float | int):
        controls["strength"] = record["strength"]
    found = Restored(controls, {name: record[name] for name in CALL_KEYS if name in record and name != "strength"})
    model = Path(str(record.get("model"))).resolve()
    if names := [name for name, path in models.items() if Path(path).resolve() == model]:
        controls["model"] = names[0]
    else:
        found.warnings.append(f"It was sampled from {record.get('model')}, which is not among the models here.")
    if record.get("weak"):
        found.warnings.append("It was sampled with a weak model, which this page does not support.")
    for name in CALL_NAMES:
        if name in record:
            _add_source(found, name, record[name], folder)
    return found


def _is_valid(record: dict[str, Any]) -> bool:
    direct = all(
        isinstance(record.get(name), type(value) | int if value == 0 else str) for name, value in DIRECT.items()
    )
    size = record.get("size")
    has_size = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)
    return direct and has_size and record["sampler"] in SAMPLERS and record["spacing"] in SPACINGS


def _add_source(found: Restored, name: str, recorded: Any, folder: Path) -> None:
    try:
        path, sha256 = Path(recorded["path"]), str(recorded["sha256"])
        if path.resolve().is_relative_to(folder.resolve()):
            found.sources[name] = read_recorded(name, str(path), sha256).image
        else:
            found.warnings.append(f"Its {name} {path} is outside {folder}: add it yourself.")
    except (KeyError, TypeError, ValueError, OSError) as error:
        found.warnings.append(f"Its {name} could not be restored: {error}")
