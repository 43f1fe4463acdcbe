"""The pictures that sample.py starts from; what is drawn names them by their path and content."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ldm.errors import UsageError
from ldm.image import load_image

BACKGROUNDS = {"init": (255, 255, 255), "mask": (0, 0, 0)}  # on what transparency is laid: in a mask it is kept
CALLED = {"init": "image", "mask": "mask"}  # their names in a pipeline's call


@dataclass(frozen=True)
class Source:
    path: str
    sha256: str
    image: Image

    @property
    def record(self) -> dict[str, str]:
        return {"path": self.path, "sha256": self.sha256}


def sources_of(given: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Source]:
    """The init and the mask that were given, else those that a picture records, which must be as they were then.

    Raises UsageError for a mask or a strength without an init; FileNotFoundError or ValueError for no such picture.
    """
    found = {name: read(name, given[name]) for name in CALLED if name in given}
    found |= {name: read_again(name, **recorded[name]) for name in CALLED if name in recorded and name not in found}
    if "init" not in found and (clash := [name for name in ("mask", "strength") if name in given]):
        raise UsageError(f"{clash[0]}= needs a picture to start from: give init= too, or leave it out")
    return found


def read(name: str, path: str) -> Source:
    data = Path(path).expanduser().read_bytes()
    image = load_image(data, background=BACKGROUNDS[name], name=path)
    return Source(path, hashlib.sha256(data).hexdigest(), image)


def read_again(name: str, path: str, sha256: str) -> Source:
    mend = f"put it back, or give another with {name}="
    try:
        source = read(name, path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}, the {name} of this picture, is not there: {mend}") from error
    if source.sha256 != sha256:
        raise ValueError(f"{path}, the {name} of this picture, is no longer what it was: {mend}")
    return source
