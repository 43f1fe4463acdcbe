import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from ldm.data.sources.captions import Captions, Text, choose_caption


def read(data: bytes | str, place: str) -> list[str]:
    extension, name = place.partition(":")[0], "k.x in y.tar"
    captions = Captions((place,))
    text = Text(extension, data if isinstance(data, bytes) else data.encode(), name)
    return captions.without_blank(captions.of_texts([text]), name)


@pytest.mark.parametrize(
    ("data", "extension"),
    [
        (b" a caf\xc3\xa9\n", "txt"),
        (b"\xef\xbb\xbfa caf\xc3\xa9", "txt"),
        (b'{"caption": "a caf\\u00e9"}', "json"),
        (b'{"text": "a caf\xc3\xa9"}', "json"),
        (b'{"caption": null, "text": "a caf\xc3\xa9"}', "json"),
    ],
)
def test_captions_are_read_from_text_and_json(data: bytes, extension: str) -> None:
    assert read(data, extension) == ["a café"]


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ('["a", " b ", "c"]', "json"),
        ('{"caption": ["a", "b", "c"]}', "json"),
        ('{"caption": "a short one", "captions": ["a", "b", "c"]}', "json:captions"),
        ('{"syn_text": ["a", null, "b", "", "c"], "caption": "d"}', "syn.json:syn_text"),
        ("a\nb\r\n\n c", "txt:lines"),
    ],
)
def test_each_string_or_line_is_a_caption_and_blank_ones_are_dropped(data: str, place: str) -> None:
    assert read(data, place) == ["a", "b", "c"]


def test_a_blank_caption_is_kept_if_it_is_the_only_one() -> None:
    assert read("", "txt") == [""] and read('["", " "]', "json") == [""]


@pytest.mark.parametrize(
    ("data", "place", "reason"),
    [
        (b"caf\xe9", "txt", "is not UTF-8 text: byte 3"),
        (b"{", "json", "is not JSON"),
        (b"[1]", "json", "has no caption"),
        (b'{"caption": 3}', "json", "has no caption"),
        (b'{"caption": "a"}', "json:other", "has no caption: found none in json:other"),
        (b'["a"]', "json:caption", "has no caption: found none in json:caption"),
    ],
)
def test_unreadable_captions_are_refused_with_the_name_of_the_file(data: bytes, place: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^k.x in y.tar {reason}"):
        read(data, place)


def test_captions_of_all_places_are_joined_and_a_repeated_place_counts_twice() -> None:
    texts = [Text("txt", b"a", ""), Text("json", b'{"re": "b", "more": ["c", "d"], "no": 1}', "")]
    captions = Captions(("txt", "txt", "json:more", "json:re", "json:no", "alt.txt"))
    assert captions.extensions == ("txt", "json", "alt.txt")
    assert captions.of_texts(texts) == ["a", "a", "c", "d", "b"]


def test_only_the_first_text_is_read_unless_places_are_given() -> None:
    assert Captions().extensions == ("txt", "json")
    assert Captions().needed(["txt", "json"]) == ["txt"]
    assert Captions(("json", "txt")).needed(["json", "txt"]) == ["json", "txt"]


@pytest.mark.parametrize("place", ["", "json:", "txt:caption", "txt:", ".txt", "TXT", "png", ":caption", "alt .txt "])
def test_invalid_places_of_captions_are_refused(place: str) -> None:
    with pytest.raises(ValueError, match=r"is not a place of captions; expected the extension of a text file such as"):
        Captions(("json", place))


def test_a_single_caption_is_always_chosen() -> None:
    assert choose_caption(["a"], 1, 2, 3) == "a"


def test_the_chosen_caption_depends_only_on_seed_id_and_draw() -> None:
    keys = [(seed, id, draw) for seed in range(3) for id in range(5) for draw in range(5)]
    first = [choose_caption("abcd", *key) for key in keys]
    for generator in (random, np.random, torch.random):
        generator.seed()  # type: ignore[attr-defined]
    assert first[::-1] == [choose_caption("abcd", *key) for key in keys[::-1]]


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_captions_are_chosen_uniformly_over_seeds_ids_and_draws(changed: int) -> None:
    def key(k: int) -> Any:
        return [k if position == changed else 7 for position in range(3)]

    counts = Counter(choose_caption("abcde", *key(k)) for k in range(2000))
    assert all(abs(counts[caption] - 400) < 72 for caption in "abcde")  # four standard deviations


def test_lone_surrogates_in_json_are_replaced_by_a_question_mark() -> None:
    assert read('{"caption": "a broken emoji \\ud83d"}', "json") == ["a broken emoji ?"]
