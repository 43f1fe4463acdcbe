"""Which of a sample's texts are captions, and which of several captions an epoch reads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ldm.data.sources.image import EXTENSIONS

Item = TypeVar("Item")
DEFAULT = ("txt", "json")
FIELDS = ("caption", "captions", "text")  # of JSON; the first of them that is there
STREAM = 1 << 32  # no sample's id, by which crops and flips are drawn with the same seed


class Text(NamedTuple):
    """A file that may hold captions; `name` is for people."""

    extension: str
    data: bytes
    name: str


@dataclass(frozen=True)
class Captions:
    """All captions that a sample has at `places`; without places those of its .txt, or else of its .json.

    A place is the extension of a text, as txt for KEY.txt and alt.txt for KEY.alt.txt, which is one caption, or with
    txt:lines one a line. json:FIELD is a string or a list of strings in JSON; json alone looks in `FIELDS`. A place
    that is given twice counts twice. Raises ValueError for what is no place.
    """

    places: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for place in self.places:
            extension, colon, field = place.partition(":")
            fits = not colon or (bool(field) if _is_json(extension) else field == "lines")
            if not extension or extension != extension.strip(". ").lower() or extension in EXTENSIONS or not fits:
                raise ValueError(
                    f"captions={list(self.places)}: {place!r} is no place of captions; expected the extension of "
                    "a text such as txt or alt.txt, txt:lines, or json:FIELD"
                )

    @property
    def extensions(self) -> tuple[str, ...]:
        """Of the texts that may hold captions."""
        return tuple(dict.fromkeys(place.partition(":")[0] for place in self.places or DEFAULT))

    def check(self, there: set[str], where: str) -> None:
        """Raises ValueError for a place whose extension is not among those that any sample has."""
        absent = [extension for extension in self.extensions if extension not in there]
        if self.places and absent:
            raise ValueError(f"{where} holds no .{absent[0]}, which captions={list(self.places)} asks for")

    def needed(self, there: Sequence[Item]) -> Sequence[Item]:
        """Those to read of what is there, which is in the order of `extensions`."""
        return there if self.places else there[:1]

    def read(self, texts: Sequence[Text]) -> list[str]:
        """What a sample has, of the texts that are `needed`; raises ValueError that names one where that is nothing."""
        return self.some(self.of_texts(texts), texts[-1].name)

    def of_texts(self, texts: Sequence[Text]) -> list[str]:
        """Raises ValueError that names the text which is not UTF-8 or not JSON."""
        return [
            caption
            for extension, field in self._parted()
            for text in texts
            if text.extension == extension
            for caption in _of_text(text, field)
        ]

    def of_row(self, row: dict[str, Any]) -> list[str]:
        """Of an object as it would lie in KEY.json."""
        return [c for extension, field in self._parted() if extension == "json" for c in _of_json(row, field)]

    def some(self, captions: list[str], name: str) -> list[str]:
        """`captions` without blank ones, unless all are. Raises ValueError if there are none."""
        if not captions:
            where = " or ".join(self.places) or 'the fields "caption", "captions" and "text"'
            raise ValueError(f"{name} has no caption: nothing at {where}")
        return [caption for caption in captions if caption] or captions[:1]

    def _parted(self) -> list[tuple[str, str]]:
        return [(place.partition(":")[0], place.partition(":")[2]) for place in self.places or DEFAULT]


def choose_caption(captions: Sequence[Item], seed: int, id: int, draw: int) -> Item:
    """Each as likely; the choice depends on (seed, id, draw) and nothing else."""
    if len(captions) == 1:
        return captions[0]
    keyed = np.random.Generator(np.random.Philox(key=[seed, STREAM], counter=[0, 0, id, draw]))
    return captions[int(keyed.integers(len(captions)))]


def decode_utf8(data: bytes, name: str) -> str:
    """Raises ValueError that names what is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} cannot be read; save it as UTF-8") from error


def _is_json(extension: str) -> bool:
    return extension.endswith("json")


def _of_text(text: Text, field: str) -> list[str]:
    content = decode_utf8(text.data, text.name)
    if not _is_json(text.extension):
        return [line.strip() for line in (content.splitlines() if field else [content])]
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{text.name} is not JSON: {error}") from error
    return _of_json(value, field)


def _of_json(value: object, field: str) -> list[str]:
    """The string, or the strings of the list, in that field, or in the first of `FIELDS` that has any."""
    if isinstance(value, dict):
        found = (_strings(value.get(name)) for name in ((field,) if field else FIELDS))
        return next((strings for strings in found if strings), [])
    return [] if field else _strings(value)


def _strings(value: object) -> list[str]:
    listed = value if isinstance(value, list) else [value]
    texts = [text for text in listed if isinstance(text, str)]
    return [text.encode("utf-8", "replace").decode().strip() for text in texts]  # JSON can hold half a surrogate pair
