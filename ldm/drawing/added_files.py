"""Reads the adapters and textual inversions that sample.py adds to a model and records in image metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm.drawing.keys import ADDED
from ldm.pipeline.loras import LoraFolder, sha256
from ldm.pipeline.prompt_syntax import Tag, without_tags
from ldm.weights.adapters.recognise import adapter_at, embedding_at
from ldm.weights.adapters.textual_inversion import read_embedding


@dataclass(frozen=True)
class AddedFile:
    """A LoRA with its weight, or a textual inversion with its token; `path` and `sha256` identify the file."""

    path: str
    sha256: str
    how: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        return {"path": self.path, "sha256": self.sha256, **self.how}


@dataclass(frozen=True)
class AddedFiles:
    loras: list[AddedFile] = field(default_factory=list)
    embeddings: list[AddedFile] = field(default_factory=list)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `Pipeline.load`."""
        adapters = [(one.path, one.how["weight"]) for one in self.loras]
        return {"adapters": adapters, "embeddings": [(one.path, one.how["token"]) for one in self.embeddings]}

    @property
    def record(self) -> dict[str, Any]:
        named = zip(ADDED, (self.loras, self.embeddings), strict=True)
        return {name: [one.record for one in files] for name, files in named if files}


def added_files(given: Mapping[str, Any], recorded: Mapping[str, Any]) -> AddedFiles:
    """Returns the given files, or otherwise the files recorded in an image, which must be unchanged.

    Raises FileNotFoundError or ValueError if a file is missing or cannot be read, or if a recorded file has changed.
    """
    found: dict[str, list[AddedFile]] = {}
    for name in ADDED:
        if name in given:
            found[name] = [_read(name, path, value) for path, value in given[name]]
        else:
            found[name] = [_read_recorded(name, **one) for one in recorded.get(name) or []]
    return AddedFiles(found["lora"], found["embedding"])


def unused_tokens(added: AddedFiles, texts: Sequence[str]) -> list[str]:
    """Returns a warning for each textual inversion whose token is in none of the prompts and negative prompts."""
    every = "\n".join(texts).lower()
    return [
        f"embedding={one.path} has no effect: its token {one.how['token']!r} is in no prompt"
        for one in added.embeddings
        if one.how["token"].lower() not in every
    ]


def check_tagged(recorded: Sequence[Mapping[str, Any]], prompts: Sequence[str], lora_dir: str | None) -> None:
    """Checks that the tags of these prompts still name the files recorded in an image.

    Raises FileNotFoundError or ValueError if a file is missing or has changed.
    """
    hashes = {one["name"]: one["sha256"] for one in recorded}
    names = dict.fromkeys(tag.name for prompt in prompts for tag in without_tags(prompt)[1] if tag.name in hashes)
    for name in names:
        what = f"the LoRA {name!r} of this image (SHA-256 {hashes[name][:12]}…)"
        remedy = "put it back, give lora_dir= the folder that holds it, or give a prompt with another tag"
        try:
            if lora_dir is None:
                raise FileNotFoundError("there is no folder of LoRA files")
            found = LoraFolder(lora_dir).tagged(Tag(name, 1.0))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{what} is not there ({error}): {remedy}") from error
        if found.sha256 != hashes[name]:
            raise ValueError(f"{found.path}, {what}, has changed since: {remedy}")


def _read(name: str, path: str, value: float | str | None) -> AddedFile:
    file = adapter_at(path) if name == "lora" else embedding_at(path)
    how = {"weight": value} if name == "lora" else {"token": value or read_embedding(path).token}
    return AddedFile(path, sha256(file), how)


def _read_recorded(name: str, path: str, sha256: str, **how: Any) -> AddedFile:
    remedy = f"put it back, or give {name}= another file"
    try:
        found = _read(name, path, *how.values())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}, the {name} of this image (SHA-256 {sha256[:12]}…), is not there: {remedy}"
        ) from error
    if found.sha256 != sha256:
        raise ValueError(f"{path}, the {name} of this image (SHA-256 {sha256[:12]}…), has changed since: {remedy}")
    return found
