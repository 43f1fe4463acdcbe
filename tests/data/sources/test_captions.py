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
    return captions.some(captions.of_texts([text]), name)


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
def test_of_a_list_or_of_lines_each_is_a_caption_and_blank_ones_are_left_out(data: str, place: str) -> None:
    assert read(data, place) == ["a", "b", "c"]


def test_a_blank_caption_is_one_where_there_is_no_other() -> None:
    assert read("", "txt") == [""] and read('["", " "]', "json") == [""]


@pytest.mark.parametrize(
    ("data", "place", "reason"),
    [
        (b"caf\xe9", "txt", "is not UTF-8 text: byte 3"),
        (b"{", "json", "is not JSON"),
        (b"[1]", "json", "has no caption"),
        (b'{"caption": 3}', "json", "has no caption"),
        (b'{"caption": "a"}', "json:other", "has no caption: nothing at json:other"),
        (b'["a"]', "json:caption", "has no caption: nothing at json:caption"),
    ],
)
def test_a_caption_that_cannot_be_read_is_refused_by_its_name(data: bytes, place: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^k.x in y.tar {reason}"):
        read(data, place)


def test_the_captions_of_all_places_are_together_and_a_place_given_twice_counts_twice() -> None:
    texts = [Text("txt", b"a", ""), Text("json", b'{"re": "b", "more": ["c", "d"], "no": 1}', "")]
    captions = Captions(("txt", "txt", "json:more", "json:re", "json:no", "alt.txt"))
    assert captions.extensions == ("txt", "json", "alt.txt")
    assert captions.of_texts(texts) == ["a", "a", "c", "d", "b"]


def test_without_places_the_first_text_is_read_alone_and_with_places_all() -> None:
    assert Captions().extensions == ("txt", "json")
    assert Captions().needed(["txt", "json"]) == ["txt"]
    assert Captions(("json", "txt")).needed(["json", "txt"]) == ["json", "txt"]


@pytest.mark.parametrize("place", ["", "json:", "txt:caption", "txt:", ".txt", "TXT", "png", ":caption", "alt .txt "])
def test_what_is_no_place_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match=r"is no place of captions; expected the extension of a text such as"):
        Captions(("json", place))


def test_one_caption_is_it() -> None:
    assert choose_caption(["a"], 1, 2, 3) == "a"


def test_the_choice_depends_on_seed_id_and_draw_alone() -> None:
    keys = [(seed, id, draw) for seed in range(3) for id in range(5) for draw in range(5)]
    first = [choose_caption("abcd", *key) for key in keys]
    for generator in (random, np.random, torch.random):
        generator.seed()  # type: ignore[attr-defined]
    assert first[::-1] == [choose_caption("abcd", *key) for key in keys[::-1]]


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_each_caption_is_as_likely_over_seeds_ids_and_draws(changed: int) -> None:
    def key(k: int) -> Any:
        return [k if place == changed else 7 for place in range(3)]

    counts = Counter(choose_caption("abcde", *key(k)) for k in range(2000))
    assert all(abs(counts[caption] - 400) < 72 for caption in "abcde")  # four standard deviations


def test_half_a_surrogate_pair_in_json_becomes_text_that_any_tokenizer_takes() -> None:
    assert read('{"caption": "a cut emoji \\ud83d"}', "json") == ["a cut emoji ?"]
