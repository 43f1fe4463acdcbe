from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest

from ldm.data.loading.order import BucketOrder, Order, permuted

LENGTHS = [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 100, 255, 257, 1000, 4097]


def order(length: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permuted(np.arange(length), length, seed, epoch)


def batches_of(length: int, batch_size: int, passes: int, **options: int) -> Iterator[list[tuple[int, int]]]:
    """Yields the batches of several passes as a trainer requests them."""
    seen = 0
    sampler = Order(length, batch_size, start=lambda: seen, **options)
    for _ in range(passes):
        for batch in sampler:
            yield batch
            seen += batch_size * sampler.world


@pytest.mark.parametrize("length", LENGTHS)
def test_a_permutation_contains_every_index_once(length: int) -> None:
    assert sorted(order(length)) == list(range(length))


@pytest.mark.parametrize("length", [10**7 + 1, 2**40])
def test_permuting_a_long_data_set_needs_no_table(length: int) -> None:
    some = permuted(np.arange(1000), length, 0, 0)
    assert len(set(some.tolist())) == 1000 and some.max() < length


def test_a_permuted_index_does_not_depend_on_the_others_in_the_call() -> None:
    together = order(100)
    assert [int(permuted(np.array([i]), 100, 0, 0)[0]) for i in range(100)] == together.tolist()


def test_seeds_and_epochs_have_different_orders() -> None:
    orders = [order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 10  # one position in 1000 agrees by chance


def test_permuted_positions_are_uncorrelated_with_the_original_ones() -> None:
    n = 10_000
    positions = order(n).astype(float)
    assert abs(np.corrcoef(np.arange(n), positions)[0, 1]) < 4 / n**0.5
    assert abs(np.corrcoef(positions[1:], positions[:-1])[0, 1]) < 4 / n**0.5
    assert (np.abs(np.diff(positions)) == 1).sum() < 20  # about two pairs stay neighbours by chance


def test_every_position_is_equally_likely_for_a_sample() -> None:
    counts = np.zeros((8, 8))
    for epoch in range(1600):
        counts[np.arange(8), order(8, 0, epoch).astype(int)] += 1
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert chi_square < 49 + 6 * (2 * 49) ** 0.5  # 49 degrees of freedom


@pytest.mark.parametrize(("length", "batch_size", "world"), [(24, 4, 1), (24, 2, 3), (25, 4, 2), (7, 2, 3), (31, 1, 5)])
def test_an_epoch_contains_every_sample_once_for_any_number_of_ranks(length: int, batch_size: int, world: int) -> None:
    ranks = [batches_of(length, batch_size, 40, rank=rank, world=world) for rank in range(world)]
    stream = [key for step in zip(*ranks, strict=True) for batch in step for key in batch]
    for epoch in range(3):
        keys = stream[epoch * length : (epoch + 1) * length]
        assert {draw for draw, _ in keys} == {epoch}
        assert sorted(index for _, index in keys) == list(range(length))


def test_the_sample_order_does_not_depend_on_the_number_of_ranks() -> None:
    def stream(batch_size: int, world: int) -> list[tuple[int, int]]:
        ranks = [batches_of(48, batch_size, 2, rank=rank, world=world) for rank in range(world)]
        return [key for step in zip(*ranks, strict=True) for batch in step for key in batch]

    assert stream(8, 1) == stream(4, 2) == stream(2, 4)


def test_all_ranks_get_the_same_number_and_size_of_batches() -> None:
    lengths = [[len(batch) for batch in Order(29, 3, rank=rank, world=2)] for rank in range(2)]
    assert lengths == [[3] * 4] * 2


@pytest.mark.parametrize(("length", "batch_size", "accumulation"), [(24, 4, 1), (26, 4, 1), (26, 4, 2), (30, 4, 3)])
def test_the_order_resumes_exactly_from_any_batch(length: int, batch_size: int, accumulation: int) -> None:
    uninterrupted = list(batches_of(length, batch_size, 5, accumulation=accumulation))
    for done in range(len(uninterrupted) - len(Order(length, batch_size, accumulation=accumulation))):
        rest = list(Order(length, batch_size, accumulation=accumulation, start=partial(int, done * batch_size)))
        assert rest == uninterrupted[done : done + len(rest)] and rest


def test_a_resumed_pass_ends_where_the_uninterrupted_one_ends() -> None:
    assert [len(list(Order(26, 4, start=partial(int, 4 * done)))) for done in range(8)] == [6, 5, 4, 3, 2, 1, 6, 5]


def test_a_pass_consists_of_complete_optimizer_steps() -> None:
    assert len(Order(26, 2, accumulation=4)) == len(list(Order(26, 2, accumulation=4))) == 12


def test_fewer_samples_than_one_optimizer_step_are_refused() -> None:
    with pytest.raises(ValueError, match=r"15 training samples, fewer than the 16 .* data.batch_size"):
        Order(15, 4, world=2, accumulation=2)


@pytest.mark.parametrize("world", [1, 2])
def test_the_samples_of_a_run_stay_together_in_order(world: int) -> None:
    batches = [next(iter(Order(120, 20, rank=rank, world=world, run=5))) for rank in range(world)]
    for batch in batches:
        indices = np.array([index for _, index in batch]).reshape(4, 5)
        assert (indices == indices[:, :1] + np.arange(5)).all() and (indices[:, 0] % 5 == 0).all()
        assert (np.diff(indices[:, 0]) != 5).any()


def test_shuffling_runs_keeps_every_sample_once() -> None:
    indices = [index for batch in batches_of(60, 6, 1, run=4) for _, index in batch]
    assert sorted(indices) == list(range(60))


@pytest.mark.parametrize("run", [0, 7])
def test_a_run_length_that_does_not_divide_the_data_is_refused(run: int) -> None:
    with pytest.raises(ValueError, match=r"data\.run"):
        Order(60, 6, run=run)


BUCKETS = np.random.default_rng(0).choice([3, 5, 9, 11], 101, p=[0.6, 0.25, 0.1, 0.05])


def bucketed(steps: int, batch_size: int, world: int, accumulation: int, seen: int = 0) -> list[list[tuple[int, int]]]:
    """Returns the keys of each optimizer step, over its accumulated batches and ranks."""
    found = []
    for step in range(steps):
        start = partial(int, seen + step * batch_size * world * accumulation)
        ranks = [
            BucketOrder(BUCKETS, batch_size, 0, rank, world, accumulation, start).__iter__() for rank in range(world)
        ]
        found.append([key for _ in range(accumulation) for rank in ranks for key in next(rank)])
    return found


def test_every_step_has_one_bucket_and_every_epoch_each_sample_once() -> None:
    steps = bucketed(101, 6, 1, 1)  # six epochs of 101 samples
    assert all(len({BUCKETS[index] for _, index in step}) == 1 for step in steps)
    assert sorted(key for step in steps for key in step) == [*product(range(6), range(101))]


def test_less_than_one_step_of_each_bucket_is_left_for_the_next_epoch() -> None:
    sizes = np.unique(BUCKETS, return_counts=True)[1]
    steps = bucketed(int((sizes // 6).sum()), 6, 1, 1)
    assert {epoch for step in steps for epoch, _ in step} == {0}
    left = BUCKETS[sorted(set(range(101)) - {index for step in steps for _, index in step})]
    assert np.unique(left, return_counts=True)[1].max() < 6


def test_bucketed_steps_do_not_depend_on_ranks_accumulation_or_resuming() -> None:
    one_rank = bucketed(40, 8, 1, 1)
    for batch_size, world, accumulation in [(1, 8, 1), (2, 4, 1), (2, 1, 4), (2, 2, 2)]:
        assert bucketed(40, batch_size, world, accumulation) == one_rank
    assert bucketed(20, 2, 2, 2, seen=20 * 8) == one_rank[20:]


def test_the_steps_of_different_buckets_are_mixed_within_an_epoch() -> None:
    buckets = [BUCKETS[step[0][1]] for step in bucketed(50, 2, 1, 1)]
    assert 20 < sum(one != other for one, other in pairwise(buckets)) < 45
