import zlib
from typing import Any

import numpy as np
import pytest

from ldm.data.sources.split import Split, SplitHash, mix


class Named:
    """Samples with the given names as keys."""

    def __init__(self, names: list[str], split_hash: SplitHash = "mixed") -> None:
        self.names, self.split_hash = names, split_hash

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


def held_out(names: list[str], every: int = 16, split_hash: SplitHash = "mixed") -> list[str]:
    split = Split(Named(names), "held_out", every, split_hash)
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


SETS = {
    "10_sks dog/{}.jpg": 80,
    "{}.png": 1000,
    "IMG_{:04}.JPG": 1000,
    "DSC{:05}.jpeg": 4000,
    "{:09}": 4000,
    "photo ({}).png": 300,
}


@pytest.mark.parametrize("pattern", SETS)
@pytest.mark.parametrize("every", [2, 5, 16, 64])
def test_numbered_files_are_held_out_independently_of_each_other(pattern: str, every: int) -> None:
    """The numbers of held-out samples and of held-out neighbours are within four standard deviations of binomials."""
    names = [pattern.format(k) for k in range(SETS[pattern])]
    chosen = np.isin(names, held_out(names, every))
    for found, share in ((chosen, 1 / every), (chosen[1:] & chosen[:-1], 1 / every**2)):
        deviation = (len(found) * share * (1 - share)) ** 0.5
        assert abs(found.sum() - len(found) * share) <= 4 * deviation + 1


@pytest.mark.parametrize("pattern", ["10_{} dog/{}.jpg", "{}/{:04}.png", "x{}_{}.webp"])
def test_the_held_out_counts_of_many_folders_have_a_binomial_mean_and_variance(pattern: str) -> None:
    """Mean and variance are 5 and 4.69 for 80 samples at 1/16; the bounds are four standard deviations."""
    folders = [[zlib.crc32(pattern.format(k, j).encode()) for j in range(80)] for k in range(1000)]
    counts = (mix(np.array(folders, np.uint32)) % 16 == 0).sum(1)
    assert abs(counts.mean() - 5) < 4 * (4.69 / 1000) ** 0.5
    assert abs(counts.var() - 4.69) < 4 * 4.69 * (2 / 1000) ** 0.5


def test_hashes_are_mixed_as_in_murmurhash3() -> None:
    """The reference implementation uses Python's integers, which do not overflow."""

    def reference(x: int) -> int:
        x = ((x ^ x >> 16) * 0x85EBCA6B) % 2**32
        x = ((x ^ x >> 13) * 0xC2B2AE35) % 2**32
        return x ^ x >> 16

    numbers = [0, 1, 2, 0xFFFFFFFF, *(zlib.crc32(name.encode()) for name in NAMES)]
    given = np.array(numbers, np.uint32)
    assert mix(given).tolist() == [reference(number) for number in numbers]
    assert given.tolist() == numbers


@pytest.mark.parametrize("count", [2, 3, 5, 20])
@pytest.mark.parametrize("every", [2, 16, 1_000_000])
def test_every_data_set_has_a_held_out_and_a_training_sample(count: int, every: int) -> None:
    for first in range(0, 400, count):
        names = [f"{k}.png" for k in range(first, first + count)]
        assert 0 < len(held_out(names, every)) < count


def test_repeated_samples_are_in_one_part() -> None:
    for names in (NAMES[:2] * 3, NAMES[:5] * 2, NAMES * 2):
        parts = [Split(Named(names), part) for part in ("train", "held_out")]
        train, other = ({part.key(index) for index in range(len(part))} for part in parts)
        assert train and other and not train & other
    assert len(Split(Named(["a", "a", "a"]), "held_out")) == 1


def test_earlier_runs_and_caches_keep_their_split() -> None:
    expected = [name for name in NAMES if zlib.crc32(name.encode()) % 16 == 0]
    cache = Split(Named(NAMES, "crc32"), "held_out")
    assert held_out(NAMES, split_hash="crc32") == expected == [cache.key(k) for k in range(len(cache))]
    assert held_out(NAMES) != expected


@pytest.mark.parametrize("names", [[], ["a.png"]])
def test_fewer_than_two_samples_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match=f"^{len(names)} sample cannot be split .*: give at least 2"):
        Split(Named(names), "train")


def test_an_unknown_hash_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data.split_hash=md5: expected one of mixed, crc32"):
        Split(Named(NAMES), "train", split_hash="md5")  # type: ignore[arg-type]


@pytest.mark.parametrize("every", [0, 1])
def test_a_share_that_makes_a_part_empty_is_refused(every: int) -> None:
    with pytest.raises(ValueError, match=r"data.held_out_every"):
        Split(Named(NAMES), "train", every)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="train or held_out"):
        Split(Named(NAMES), "test")  # type: ignore[arg-type]
