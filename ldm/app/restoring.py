"""A picture's recorded settings → what the page's controls show. A file may come from anyone: nothing is trusted."""

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

ALIKE = {"prompt": "", "negative": "", "sampler": "", "spacing": "", "seed": 0, "steps": 0, "guidance": 0.0}


@dataclass(frozen=True)
class Restored:
    """`controls` by name; `call` as a pipeline takes it, with what has no control; `remarks` say what is missing."""

    controls: dict[str, Any]
    call: dict[str, Any]
    sources: dict[str, Image] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def restored(png: Path, models: Mapping[str, str], folder: Path) -> Restored:
    """What a PNG records; pictures that it started from are read from `folder` only.

    Raises ValueError for a file without all settings.
    """
    record = read_metadata(png)
    if not _is_whole(record):
        raise ValueError(f"{png.name} does not hold all settings of a picture that ldm drew")
    height, width = record["size"]
    controls = {name: record[name] for name in ALIKE} | {"height": height, "width": width, "count": 1}
    if isinstance(record.get("strength"), float | int):
        controls["strength"] = record["strength"]
    found = Restored(controls, {name: record[name] for name in CALL_KEYS if name in record and name != "strength"})
    model = Path(str(record.get("model"))).resolve()
    if names := [name for name, path in models.items() if Path(path).resolve() == model]:
        controls["model"] = names[0]
    else:
        found.remarks.append(f"It was drawn by {record.get('model')}, which is none of the models here.")
    if record.get("weak"):
        found.remarks.append("It was drawn with a weak model beside, which this page cannot do.")
    for name in CALL_NAMES:
        if name in record:
            _add_source(found, name, record[name], folder)
    return found


def _is_whole(record: dict[str, Any]) -> bool:
    alike = all(isinstance(record.get(name), type(one) | int if one == 0 else str) for name, one in ALIKE.items())
    size = record.get("size")
    sized = isinstance(size, list) and len(size) == 2 and all(isinstance(one, int) for one in size)
    return alike and sized and record["sampler"] in SAMPLERS and record["spacing"] in SPACINGS


def _add_source(found: Restored, name: str, told: Any, folder: Path) -> None:
    try:
        path, sha256 = Path(told["path"]), str(told["sha256"])
        if path.resolve().is_relative_to(folder.resolve()):
            found.sources[name] = read_recorded(name, str(path), sha256).image
        else:
            found.remarks.append(f"Its {name} {path} lies outside of {folder}: put it in yourself.")
    except (KeyError, TypeError, ValueError, OSError) as error:
        found.remarks.append(f"Its {name} could not be restored: {error}")
