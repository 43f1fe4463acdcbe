"""Reads the captions of a sample from text and JSON files, and chooses one of several for each epoch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ldm.data.sources.image import EXTENSIONS

Item = TypeVar("Item")
DEFAULT = ("txt", "json")
FIELDS = ("caption", "captions", "text")  # of JSON; the first one present counts
STREAM = 1 << 32  # above every sample id, so that this random stream differs from those of crops and flips


class Text(NamedTuple):
    """A file that may contain captions; `name` is a human-readable name for messages."""

    extension: str
    data: bytes
    name: str


@dataclass(frozen=True)
class Captions:
    """Reads all captions of a sample from `places`, or without places from the first of its `default` ones.

    A place is the extension of a text file, such as txt for KEY.txt or alt.txt for KEY.alt.txt. The file is a single
    caption, or with txt:lines one caption per line. json:FIELD is a string or a list of strings in JSON, and json alone
    searches `FIELDS`. A place that is given twice counts twice. Raises ValueError for an invalid place.
    """

    places: tuple[str, ...] = ()
    default: tuple[str, ...] = DEFAULT

    def __post_init__(self) -> None:
        for place in self.places:
            extension, colon, field = place.partition(":")
            valid = not colon or (bool(field) if _is_json(extension) else field == "lines")
            if not extension or extension != extension.strip(". ").lower() or extension in EXTENSIONS or not valid:
                raise ValueError(
                    f"captions={list(self.places)}: {place!r} is not a place of captions; expected the extension of "
                    "a text file such as txt or alt.txt, txt:lines, or json:FIELD"
                )

    @property
    def extensions(self) -> tuple[str, ...]:
        """The extensions of the files that may contain captions."""
        return tuple(dict.fromkeys(place.partition(":")[0] for place in self.places or self.default))

    def check(self, present: set[str], where: str) -> None:
        """Raises ValueError if the extension of a place is not among the `present` ones, which any sample has."""
        absent = [extension for extension in self.extensions if extension not in present]
        if self.places and absent:
            raise ValueError(
                f"{where} has no .{absent[0]} file, but captions={list(self.places)} requires one: remove this place, "
                "or add the captions"
            )

    def needed(self, present: Sequence[Item]) -> Sequence[Item]:
        """Returns which of the texts `present`, in the order of `extensions`, are to be read."""
        return present if self.places else present[:1]

    def read(self, texts: Sequence[Text]) -> list[str]:
        """Returns the captions in a sample's `needed` texts. Raises ValueError with the name of a text without any."""
        return self.without_blank(self.of_texts(texts), texts[-1].name)

    def of_texts(self, texts: Sequence[Text]) -> list[str]:
        """Returns the captions in `texts`. Raises ValueError with the name of a text that is not UTF-8 or JSON."""
        return [
            caption
            for extension, field in self._extensions_and_fields()
            for text in texts
            if text.extension == extension
            for caption in _of_text(text, field)
        ]

    def of_row(self, row: dict[str, Any]) -> list[str]:
        """Returns the captions in an object that is read as if it were the content of KEY.json."""
        places = self._extensions_and_fields()
        return [caption for extension, field in places if extension == "json" for caption in _of_json(row, field)]

    def without_blank(self, captions: list[str], name: str) -> list[str]:
        """Returns `captions` without blank ones, or one blank caption if all are. Raises ValueError if empty."""
        if not captions:
            where = " or ".join(self.places) or 'the fields "caption", "captions" and "text"'
            raise ValueError(f"{name} has no caption: found none in {where}")
        return [caption for caption in captions if caption] or captions[:1]

    def _extensions_and_fields(self) -> list[tuple[str, str]]:
        return [(place.partition(":")[0], place.partition(":")[2]) for place in self.places or self.default]


def choose_caption(captions: Sequence[Item], seed: int, id: int, draw: int) -> Item:
    """Chooses a caption uniformly at random, as a function of (seed, id, draw)."""
    if len(captions) == 1:
        return captions[0]
    keyed = np.random.Generator(np.random.Philox(key=[seed, STREAM], counter=[0, 0, id, draw]))
    return captions[int(keyed.integers(len(captions)))]


def decode_utf8(data: bytes, name: str) -> str:
    """Decodes UTF-8 with or without a byte order mark. Raises ValueError with the `name` of data that is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is invalid; save it as UTF-8") from error


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
    """Returns the string or list of strings in `field`, or without a field in the first of `FIELDS` that has any."""
    if isinstance(value, dict):
        found = (_strings(value.get(name)) for name in ((field,) if field else FIELDS))
        return next((strings for strings in found if strings), [])
    return [] if field else _strings(value)


def _strings(value: object) -> list[str]:
    listed = value if isinstance(value, list) else [value]
    texts = [text for text in listed if isinstance(text, str)]
    return [text.encode("utf-8", "replace").decode().strip() for text in texts]  # JSON may contain lone surrogates
