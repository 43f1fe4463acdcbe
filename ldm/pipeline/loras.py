"""Finds the LoRA files that the tags of prompts name, by the rules of AUTOMATIC1111's web UI.

A name is that of a file without its ending, in the folder or any folder below it, or the name in its metadata.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.pipeline.inputs import Between, ImageRequest
from ldm.pipeline.prompt_syntax import Tag, without_tags
from ldm.weights.adapters.merging import Weights
from ldm.weights.storage.opening import open_tensors

SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")
ALIAS = "ss_output_name"  # kohya's trainer stores the original name of a file here
NEAREST = 3


@dataclass(frozen=True)
class TaggedLora:
    """The file that a tag names, and its weights, as in the tag."""

    name: str
    path: str
    sha256: str
    weight: float
    text_weight: float | None = None

    @property
    def weights(self) -> Weights:
        return Weights(self.weight, self.weight if self.text_weight is None else self.text_weight)

    @property
    def record(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class TaggedRequest:
    """The inputs of an image as given, the same without tags, and the files that its tags name."""

    request: ImageRequest
    plain: ImageRequest
    loras: tuple[TaggedLora, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        return {"lora_tags": [lora.record for lora in self.loras]} if self.loras else {}


class LoraFolder:
    """The adapter files in a folder and the folders below it. Raises NotADirectoryError if there is no such folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise NotADirectoryError(f"lora_dir={path} is not a folder; give the folder that holds your LoRA files")

    def files(self) -> dict[str, Path]:
        """Returns the current files by their path in the folder."""
        return {file.relative_to(self.path).as_posix(): file for file in sorted(_files(self.path))}

    def find(self, name: str) -> Path:
        """Returns the file with this name. A path in the folder, with or without its ending, is a name, too.

        Raises FileNotFoundError with the nearest names, or ValueError if several files have the name.
        """
        files = self.files()
        if name in files:
            return files[name]
        found = {path: file for path, file in files.items() if name in (file.stem, os.path.splitext(path)[0])}
        found = found or {path: file for path, file in files.items() if _alias(file) == name}
        if not found:
            raise FileNotFoundError(f"there is no LoRA {name!r} in {self.path}: {_nearest(name, files)}")
        if len(found) > 1:
            raise ValueError(f"several files in {self.path} are named {name!r}: write one of {', '.join(found)}")
        return next(iter(found.values()))

    def tagged(self, tag: Tag) -> TaggedLora:
        """Returns the file that a tag names, or raises as `find` does."""
        file = self.find(tag.name)
        return TaggedLora(tag.name, str(file), sha256(file), tag.weight, tag.text_weight)


def read_tags(requests: Sequence[ImageRequest], folder: LoraFolder | None) -> list[TaggedRequest]:
    """Returns the requests with the files that the tags of their prompts name.

    Raises ValueError for a tag in a negative prompt, for two prompts of one image with different tags, and for a tag if
    there is no folder; FileNotFoundError or ValueError for a name without a file, or with several.
    """
    files: dict[Tag, TaggedLora] = {}
    tagged = []
    for request in requests:
        plain, tags = _without_tags(request)
        for tag in tags:
            if folder is None:
                raise ValueError(f"the prompt names the LoRA {tag.name!r}, but there is no folder of LoRA files: "
                                 "give lora_dir, the folder that holds it")  # fmt: skip
            if tag not in files:
                files[tag] = folder.tagged(tag)
        tagged.append(TaggedRequest(request, plain, tuple(files[tag] for tag in tags)))
    return tagged


def _without_tags(request: ImageRequest) -> tuple[ImageRequest, list[Tag]]:
    for tag in without_tags(request.negative)[1]:
        raise ValueError(
            f"the negative prompt names the LoRA {tag.name!r}, but a LoRA changes the network for both prompts: move "
            f"the tag to the prompt, with a negative weight for the opposite, such as <lora:{tag.name}:-1>"
        )
    if not isinstance(request.prompt, Between):
        text, tags = without_tags(request.prompt)
        return replace(request, prompt=text), tags
    (first, tags), (second, others) = without_tags(request.prompt.first), without_tags(request.prompt.second)
    if tags != others:
        raise ValueError("two prompts of one image name different LoRAs: give both prompts the same tags")
    return replace(request, prompt=replace(request.prompt, first=first, second=second)), tags


def _files(folder: Path) -> Iterator[Path]:
    """Yields the adapter files below a folder; follows links to folders, each at most once."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(parent, name)) not in seen]
        yield from (Path(parent, name) for name in names if name.endswith(SUFFIXES) and not name.startswith("."))


def _alias(file: Path) -> str | None:
    if file.suffix != ".safetensors":
        return None
    try:
        return open_tensors(file).metadata.get(ALIAS)
    except (OSError, ValueError):
        return None


def _nearest(name: str, files: dict[str, Path]) -> str:
    stems = {file.stem.lower(): file.stem for file in files.values()}
    if not stems:
        return "the folder holds no LoRA files"
    close = get_close_matches(name.lower(), stems, NEAREST, cutoff=0.4)
    if close:
        return f"the nearest names are {', '.join(stems[one] for one in close)}"
    rest = f" and {len(stems) - NEAREST} others" if len(stems) > NEAREST else ""
    return f"it holds {', '.join([*stems.values()][:NEAREST])}{rest}"


def sha256(file: Path) -> str:
    """Returns the SHA-256 of a file; a file that has not changed is read only once."""
    stat = file.stat()
    return _sha256(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=256)
def _sha256(file: Path, _mtime_ns: int, _size: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
