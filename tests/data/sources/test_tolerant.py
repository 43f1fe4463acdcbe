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
    """Samples in groups of ten, of which those in `bad` are unreadable."""

    def __init__(self, length: int, bad: set[int], error: type[Exception] = ValueError) -> None:
        self.length, self.bad, self.error = length, bad, error
        self.requests: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        draw, k = draw_and_index(index, self.length)
        self.requests.append((draw, k))
        if k in self.bad:
            raise self.error(f"{k}.png is corrupt")
        return {"image": torch.full((3, 1, 1), k % 256, dtype=torch.uint8), "caption": str(k), "key": str(k), "id": k}

    def group(self, index: int) -> range:
        return range(index // 10 * 10, min(index // 10 * 10 + 10, self.length))


def test_a_readable_sample_is_returned_unchanged() -> None:
    data = Numbers(20, {4})
    sample = Tolerant(data)[2, 3]
    assert (sample["id"], sample["bad"], data.requests) == (3, [], [(2, 3)])


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_bad_sample_is_replaced_by_the_next_readable_one_of_the_draw(error: type[Exception]) -> None:
    data = Numbers(20, {4, 5}, error)
    sample = Tolerant(data)[7, 4]
    assert (sample["id"], sample["bad"]) == (6, ["4.png is corrupt"]) and data.requests == [(7, 4), (7, 5), (7, 6)]


def test_an_outage_of_object_storage_stops_after_a_few_samples() -> None:
    data = Numbers(100_000, set(range(100_000)), Unreachable)
    with pytest.raises(Unreachable, match=r"^object storage did not answer for 16 samples; the last error: \d+.png is"):
        Tolerant(data)[12]
    assert len(data.requests) == OUTAGE


def test_samples_of_an_unreachable_shard_are_replaced() -> None:
    sample = Tolerant(Numbers(100_000, set(range(10, 20)), Unreachable))[12]
    assert not 10 <= sample["id"] < 20 and sample["bad"] == ["12.png is corrupt"]


def test_the_replacement_is_from_the_same_group_if_possible() -> None:
    assert Tolerant(Numbers(30, {18, 19}))[18]["id"] == 10


def test_an_entirely_bad_group_is_abandoned_after_a_few_attempts() -> None:
    data = Numbers(100_000, set(range(10, 20)))
    assert not 10 <= Tolerant(data)[12]["id"] < 20
    assert len(data.requests) < 12


def test_replacements_for_a_bad_group_are_spread_over_the_data_set() -> None:
    tolerant = Tolerant(Numbers(1000, set(range(0, 500))))
    assert len({tolerant[k]["id"] // 10 for k in range(200)}) > 10


def test_the_only_readable_sample_of_a_small_set_replaces_all_others() -> None:
    tolerant = Tolerant(Numbers(50, set(range(50)) - {33}))
    assert {tolerant[k]["id"] for k in range(50)} == {33}


@pytest.mark.parametrize("length", [50, 100_000, 1_000_000])
def test_an_entirely_unreadable_data_set_is_refused_with_an_example(length: int) -> None:
    data = Numbers(length, set(range(length)))
    with pytest.raises(ValueError, match=r"^none of \d+ samples could be read; the first error: 7.png is corrupt$"):
        Tolerant(data)[7]
    assert {*range(length)} == {k for _, k in data.requests} if length == 50 else 990 < len(data.requests) < 1010


def test_programming_errors_do_not_count_as_bad_samples() -> None:
    with pytest.raises(TypeError):
        Tolerant(Numbers(20, {4}, TypeError))[4]
    with pytest.raises(IndexError):
        Tolerant(Numbers(20, set()))[20]


def test_workers_report_bad_samples_to_the_main_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tar(tmp_path / "a.tar", samples(8) | {"0003.png": b"<html>"})
    write_tar(tmp_path / "b.tar", samples(8, 8))
    loader = DataLoader(Tolerant(Shards(tmp_path, 8)), batch_size=4, num_workers=2, collate_fn=collate)
    batches = list(loader)
    bad = [reasons for batch in batches for reasons in batch["bad"]]
    assert [k for k, reasons in enumerate(bad) if reasons] == [3] and "0003 in" in bad[3][0]
    assert torch.cat([batch["id"] for batch in batches]).tolist() == [0, 1, 2, 4, 4, *range(5, 16)]


def test_bad_samples_are_tolerated_up_to_the_allowed_share() -> None:
    counter = BadSamples(0.1, total=100, setting="data.max_bad_share")
    counter.count([["a"]] * 10 + [[]] * 90)
    counter.count([[]] * 10 + [["b"]])
    with pytest.raises(ValueError) as raised:
        counter.count([["c.png in x.tar is corrupt"]])
    assert str(raised.value) == (
        "12 of 112 samples (10.7%) could not be read, for example: c.png in x.tar is corrupt; "
        "fix the data or raise data.max_bad_share, now 0.1"
    )


def test_the_share_of_bad_samples_is_judged_over_at_least_1000_samples() -> None:
    counter = BadSamples(0.01, total=10**9)
    counter.count([["a"]] * 10)
    with pytest.raises(ValueError, match="11 of 11 samples"):
        counter.count([["a"]])


def test_a_share_of_zero_tolerates_no_bad_sample() -> None:
    with pytest.raises(ValueError, match="1 of 500 samples"):
        BadSamples(0, total=10**9).count([[]] * 499 + [["a"]])


def test_a_share_of_one_tolerates_all_bad_samples() -> None:
    counted = BadSamples(1, total=10)
    counted.count([["a"]] * 50)
    assert (counted.bad, counted.seen) == (50, 50)


def test_an_invalid_share_is_refused_with_its_setting() -> None:
    with pytest.raises(ValueError, match=r"^data.max_bad_share=5: "):
        BadSamples(5, total=10)
