import zlib
from typing import Any

import numpy as np
import pytest

from ldm.data.sources.split import Split


class Named:
    """Samples with the given names as keys."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: Any) -> Any:
        return key[0], self.names[key[1]]

    @property
    def hashes(self) -> np.ndarray:
        return np.array([zlib.crc32(name.encode()) for name in self.names], np.uint32)

    def key(self, index: int) -> str:
        return self.names[index]


NAMES = [f"{i:05}" for i in range(2000)]


def held_out(names: list[str], every: int = 16) -> list[str]:
    split = Split(Named(names), "held_out", every)
    return [split.key(index) for index in range(len(split))]


def test_the_parts_are_disjoint_and_contain_all_samples() -> None:
    parts = [Split(Named(NAMES), part) for part in ("train", "held_out")]
    found = [part.key(index) for part in parts for index in range(len(part))]
    assert sorted(found) == NAMES


def test_about_one_in_every_n_samples_is_held_out() -> None:
    assert abs(len(held_out(NAMES, 16)) - 125) < 4 * 125**0.5


def test_samples_keep_their_part_when_others_are_added_or_removed() -> None:
    some = NAMES[300:900:2]
    assert held_out(list(reversed(some)), 4) == [name for name in reversed(some) if name in set(held_out(NAMES, 4))]


def test_a_split_passes_the_draw_to_the_data_set() -> None:
    split = Split(Named(NAMES), "held_out")
    samples: list[Any] = [split[7, 3], split[3]]
    assert samples == [(7, split.key(3)), (0, split.key(3))]


def test_a_bad_sample_can_be_replaced_by_any_of_its_part() -> None:
    split = Split(Named(NAMES), "held_out")
    assert list(split.group(5)) == list(range(len(split)))


@pytest.mark.parametrize(("part", "change"), [("held_out", "lower"), ("train", "raise")])
def test_an_empty_part_is_refused_with_the_setting_to_change(part: Any, change: str) -> None:
    name = held_out(NAMES, 2)[0] if part == "train" else next(name for name in NAMES if name not in held_out(NAMES, 2))
    with pytest.raises(ValueError, match=f"none of 1 samples is {part}; add data, or {change} data.held_out_every=2"):
        Split(Named([name]), part, 2)


@pytest.mark.parametrize("every", [0, 1])
def test_a_share_that_makes_a_part_empty_is_refused(every: int) -> None:
    with pytest.raises(ValueError, match=r"data.held_out_every"):
        Split(Named(NAMES), "train", every)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="train or held_out"):
        Split(Named(NAMES), "test")  # type: ignore[arg-type]
