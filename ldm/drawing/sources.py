"""Reads the source image and mask of sample.py, which generated images record by path and SHA-256."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ldm.errors import UsageError
from ldm.image import load_image
from ldm.pipeline.inputs import BACKGROUNDS

CALL_NAMES = {"init": "image", "mask": "mask"}  # key of sample.py: argument of a pipeline's call


@dataclass(frozen=True)
class Source:
    path: str
    sha256: str
    image: Image

    @property
    def record(self) -> dict[str, str]:
        return {"path": self.path, "sha256": self.sha256}


def sources_of(given: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Source]:
    """Reads init and mask as given or, if not given, as recorded by an image.

    Raises UsageError for a mask or strength without init, FileNotFoundError or ValueError for a file that cannot be
    read or, if recorded, has changed.
    """
    found = {name: read(name, given[name]) for name in CALL_NAMES if name in given}
    found |= {
        name: read_recorded(name, **recorded[name]) for name in CALL_NAMES if name in recorded and name not in found
    }
    if "init" not in found and (clash := [name for name in ("mask", "strength") if name in given]):
        raise UsageError(f"{clash[0]}= needs a source image: give init= too, or leave it out")
    return found


def read(name: str, path: str) -> Source:
    data = Path(path).expanduser().read_bytes()
    image = load_image(data, background=BACKGROUNDS[CALL_NAMES[name]], name=path)
    return Source(path, hashlib.sha256(data).hexdigest(), image)


def read_recorded(name: str, path: str, sha256: str) -> Source:
    remedy = f"restore it, or give another file as {name}="
    try:
        source = read(name, path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}, the {name} of this image, does not exist: {remedy}") from error
    if source.sha256 != sha256:
        raise ValueError(f"{path}, the {name} of this image, has changed since: {remedy}")
    return source
