"""Restores the controls of the page from the settings in a PNG, which is untrusted input."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ldm.app.adapters import KINDS, AdapterFiles, rows
from ldm.app.web_ui import parse, read_parameters
from ldm.drawing.added_files import check_tagged
from ldm.drawing.job import CALL_KEYS
from ldm.drawing.recorded import CHECKS
from ldm.drawing.sources import CALL_NAMES, read_recorded
from ldm.image import read_metadata
from ldm.pipeline.loras import sha256
from ldm.pipeline.prompts import SYNTAXES
from ldm.sampling.driver import SAMPLERS
from ldm.sampling.spacing import SPACINGS

# Controls whose value is the recorded setting, with a value of its type.
DIRECT = {
    **{"prompt": "", "negative": "", "sampler": "", "spacing": "", "prompt_syntax": ""},
    **{"seed": 0, "steps": 0, "guidance": 0.0},
}
OLDER = {"prompt_syntax": "plain"}  # settings of images that were sampled before there was a choice


@dataclass(frozen=True)
class Restored:
    """Values of controls by name, arguments of a pipeline's call, source images, and warnings about missing ones."""

    controls: dict[str, Any]
    call: dict[str, Any]
    sources: dict[str, Image] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def restore(png: Path, models: Mapping[str, str], folder: Path, adapters: AdapterFiles) -> Restored:
    """Reads the settings of a PNG, and its source image and mask only if they are in `folder`.

    Of a PNG of AUTOMATIC1111's web UI it restores what has a counterpart here. LoRA files and textual inversions are
    chosen if `adapters` has files of the same name and contents.

    Raises ValueError if settings are missing or have the wrong type.
    """
    if (text := read_parameters(png)) is not None:
        values, call, warnings = parse(text)
        listed = {"loras": rows([*adapters.offered()["lora"]], {}), "embeddings": []}
        return Restored(values | listed, call, warnings=warnings)
    try:
        record = OLDER | read_metadata(png)
    except ValueError as error:  # quotes the path of the upload
        raise ValueError(str(error).replace(str(png), png.name)) from error
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
    _add_adapters(found, record, adapters)
    return found


def _is_valid(record: dict[str, Any]) -> bool:
    direct = all(
        isinstance(record.get(name), type(value) | int if value == 0 else str) for name, value in DIRECT.items()
    )
    size = record.get("size")
    has_size = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)
    has_files = all(CHECKS[name](record.get(name)) for name in (*KINDS, "lora_tags"))
    named = ("sampler", SAMPLERS), ("spacing", SPACINGS), ("prompt_syntax", SYNTAXES)
    return direct and has_size and has_files and all(record[name] in known for name, known in named)


def _add_source(found: Restored, name: str, recorded: Any, folder: Path) -> None:
    try:
        path, sha256 = Path(recorded["path"]), str(recorded["sha256"])
        if path.resolve().is_relative_to(folder.resolve()):
            found.sources[name] = read_recorded(name, str(path), sha256).image
        else:
            found.warnings.append(f"Its {name} {path} is outside {folder}: add it yourself.")
    except (KeyError, TypeError, ValueError, OSError) as error:
        found.warnings.append(f"Its {name} could not be restored: {error}")


def _add_adapters(found: Restored, record: Mapping[str, Any], adapters: AdapterFiles) -> None:
    """Chooses the recorded files among those of the page, and warns of each that is missing or has changed."""
    files = adapters.every()
    chosen: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for kind, weights in chosen.items():
        for one in record.get(kind) or []:
            same = {
                name: file for name, path in files[kind].items() if (file := Path(path)).name == Path(one["path"]).name
            }
            names = [name for name, file in same.items() if sha256(file) == one["sha256"]]
            if names:
                weights[names[0]] = weights.get(names[0], 0.0) + one.get("weight", 1.0)
            else:
                problem = "has changed since" if same else "is not among the files here: drop it on the page"
                found.warnings.append(f"Its {kind} {one['path']} {problem}.")
    listed = dict.fromkeys([*adapters.offered()["lora"], *chosen["lora"]])
    found.controls["loras"], found.controls["embeddings"] = rows([*listed], chosen["lora"]), [*chosen["embedding"]]
    if tags := record.get("lora_tags"):
        try:
            check_tagged(tags, [record["prompt"]], None if adapters.folder is None else str(adapters.folder.path))
        except (ValueError, OSError) as error:
            found.warnings.append(f"Not all is restored: {error}.")
