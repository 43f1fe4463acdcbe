from itertools import combinations

import pytest
import torch
from scipy import stats

from ldm.random import normal, philox, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_reproduces_the_known_answers_of_random123(counter, key, expected):
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), key)) == expected


@pytest.mark.parametrize("distribution", [normal, uniform])
def test_a_sample_gets_the_same_bits_in_any_batch_and_order(distribution):
    ids = torch.tensor([7, 3, 2**40 + 3, 11, 0])
    together = distribution(5, "noise", ids, 2, (3, 5))
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(distribution(5, "noise", ids[order], 2, (3, 5)), together[order])
    for i in range(len(ids)):
        assert torch.equal(distribution(5, "noise", ids[i : i + 1], 2, (3, 5))[0], together[i])


def test_large_batches_give_the_same_bits_as_single_samples():
    ids = torch.arange(500)
    together = normal(0, "noise", ids, 0, (4, 7, 9))
    alone = torch.cat([normal(0, "noise", ids[i : i + 1], 0, (4, 7, 9)) for i in range(500)])
    assert torch.equal(together, alone)


def test_every_component_of_the_key_changes_the_numbers():
    keys = [
        (0, "noise", 0, 0),
        (1, "noise", 0, 0),
        (0, "time", 0, 0),
        (0, "noise", 1, 0),
        (0, "noise", 2**32, 0),
        (0, "noise", 0, 1),
    ]
    numbers = [uniform(seed, stream, torch.tensor([i]), draw, (8,)) for seed, stream, i, draw in keys]
    assert all(not torch.any(first == second) for first, second in combinations(numbers, 2))


def test_a_tensor_of_draws_gives_the_same_numbers_as_single_calls():
    ids, draws = torch.tensor([4, 4, 9]), torch.tensor([0, 6, 6])
    together = normal(1, "noise", ids, draws, (5,))
    for i in range(3):
        assert torch.equal(together[i : i + 1], normal(1, "noise", ids[i : i + 1], int(draws[i]), (5,)))


def test_normal_numbers_are_standard_normal_and_independent():
    x = normal(3, "noise", torch.arange(200), 0, (1001,)).double()
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    bound = 5 / x.numel() ** 0.5  # five standard errors
    assert (x[:, 1:] * x[:, :-1]).mean().abs() < bound  # between numbers
    assert (x[1:] * x[:-1]).mean().abs() < bound  # between samples


def test_uniform_numbers_are_uniform_float64_below_one():
    u = uniform(3, "time", torch.arange(100_000), 0)
    assert u.dtype == torch.float64 and u.shape == (100_000,)
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_uniform_numbers_keep_all_32_bits_of_a_word():
    words = uniform(3, "time", torch.arange(1000), 0) * 2**32
    assert torch.equal(words, words.round()) and (words[words > 2**31] % 2 == 1).any()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_does_not_fit_32_bits_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}"):
        normal(seed, "noise", torch.tensor([0]), 0, (1,))
