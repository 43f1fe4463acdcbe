from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from ldm.data.loading.datamodule import collate
from ldm.data.sources.image import Sample, draw_and_index
from ldm.data.sources.shards import Shards
from ldm.data.sources.storage import Unreachable
from ldm.data.sources.tolerant import OUTAGE, BadSamples, Tolerant
from tests.data.tars import samples, write_tar


class Numbers:
    """Samples that cannot be read where `bad` says so, in groups of ten."""

    def __init__(self, length: int, bad: set[int], error: type[Exception] = ValueError) -> None:
        self.length, self.bad, self.error = length, bad, error
        self.asked: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        draw, k = draw_and_index(index, self.length)
        self.asked.append((draw, k))
        if k in self.bad:
            raise self.error(f"{k}.png is damaged")
        return {"image": torch.full((3, 1, 1), k % 256, dtype=torch.uint8), "caption": str(k), "key": str(k), "id": k}

    def group(self, index: int) -> range:
        return range(index // 10 * 10, min(index // 10 * 10 + 10, self.length))


def test_a_good_sample_is_passed_on_as_it_is() -> None:
    data = Numbers(20, {4})
    sample = Tolerant(data)[2, 3]
    assert (sample["id"], sample["bad"], data.asked) == (3, [], [(2, 3)])


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_bad_sample_is_replaced_by_the_next_good_one_of_the_same_draw(error: type[Exception]) -> None:
    data = Numbers(20, {4, 5}, error)
    sample = Tolerant(data)[7, 4]
    assert (sample["id"], sample["bad"]) == (6, ["4.png is damaged"]) and data.asked == [(7, 4), (7, 5), (7, 6)]


def test_an_outage_of_object_storage_is_not_waited_for_sample_by_sample() -> None:
    data = Numbers(100_000, set(range(100_000)), Unreachable)
    with pytest.raises(Unreachable, match=r"^none of 16 samples came from object storage; the last: \d+.png is"):
        Tolerant(data)[12]
    assert len(data.asked) == OUTAGE


def test_a_shard_that_cannot_be_reached_is_replaced() -> None:
    sample = Tolerant(Numbers(100_000, set(range(10, 20)), Unreachable))[12]
    assert not 10 <= sample["id"] < 20 and sample["bad"] == ["12.png is damaged"]


def test_the_replacement_is_of_the_same_group_where_there_is_a_good_one() -> None:
    assert Tolerant(Numbers(30, {18, 19}))[18]["id"] == 10


def test_a_wholly_bad_group_is_left_after_a_few_attempts() -> None:
    data = Numbers(100_000, set(range(10, 20)))
    assert not 10 <= Tolerant(data)[12]["id"] < 20
    assert len(data.asked) < 12


def test_replacements_for_a_bad_group_are_spread_over_the_data_set() -> None:
    tolerant = Tolerant(Numbers(1000, set(range(0, 500))))
    assert len({tolerant[k]["id"] // 10 for k in range(200)}) > 10


def test_the_last_good_sample_of_a_small_set_is_found_whatever_was_asked_for() -> None:
    tolerant = Tolerant(Numbers(50, set(range(50)) - {33}))
    assert {tolerant[k]["id"] for k in range(50)} == {33}


@pytest.mark.parametrize("length", [50, 100_000, 1_000_000])
def test_a_set_that_is_all_bad_is_refused_with_an_example(length: int) -> None:
    data = Numbers(length, set(range(length)))
    with pytest.raises(ValueError, match=r"^none of \d+ samples tried could be read; the first: 7.png is damaged$"):
        Tolerant(data)[7]
    assert {*range(length)} == {k for _, k in data.asked} if length == 50 else 990 < len(data.asked) < 1010


def test_mistakes_of_the_program_are_not_taken_for_bad_samples() -> None:
    with pytest.raises(TypeError):
        Tolerant(Numbers(20, {4}, TypeError))[4]
    with pytest.raises(IndexError):
        Tolerant(Numbers(20, set()))[20]


def test_damage_in_a_shard_reaches_the_main_process_through_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tar(tmp_path / "a.tar", samples(8) | {"0003.png": b"<html>"})
    write_tar(tmp_path / "b.tar", samples(8, 8))
    loader = DataLoader(Tolerant(Shards(tmp_path, 8)), batch_size=4, num_workers=2, collate_fn=collate)
    batches = list(loader)
    bad = [reasons for batch in batches for reasons in batch["bad"]]
    assert [k for k, reasons in enumerate(bad) if reasons] == [3] and "0003 in" in bad[3][0]
    assert torch.cat([batch["id"] for batch in batches]).tolist() == [0, 1, 2, 4, 4, *range(5, 16)]


def test_bad_samples_are_borne_up_to_their_share_and_refused_beyond_it() -> None:
    counter = BadSamples(0.1, total=100, setting="data.max_bad_share")
    counter.count([["a"]] * 10 + [[]] * 90)
    counter.count([[]] * 10 + [["b"]])
    with pytest.raises(ValueError) as raised:
        counter.count([["c.png in x.tar is damaged"]])
    assert str(raised.value) == (
        "12 of 112 samples (10.7%) could not be read, as in: c.png in x.tar is damaged; "
        "mend the data or raise data.max_bad_share, now 0.1"
    )


def test_one_bad_sample_in_the_first_batch_is_no_verdict_on_a_large_set() -> None:
    counter = BadSamples(0.01, total=10**9)
    counter.count([["a"]] * 10)
    with pytest.raises(ValueError, match="11 of 11 samples"):
        counter.count([["a"]])


def test_a_share_of_zero_bears_none() -> None:
    with pytest.raises(ValueError, match="1 of 500 samples"):
        BadSamples(0, total=10**9).count([[]] * 499 + [["a"]])


def test_a_share_of_one_bears_all() -> None:
    counted = BadSamples(1, total=10)
    counted.count([["a"]] * 50)
    assert (counted.bad, counted.seen) == (50, 50)


def test_a_share_that_is_no_share_is_refused_by_its_setting() -> None:
    with pytest.raises(ValueError, match=r"^data.max_bad_share=5: "):
        BadSamples(5, total=10)
