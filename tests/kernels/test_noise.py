"""Tests the kernel of keyed random numbers against their definition on the CPU."""

import zlib

import pytest
import torch

from ldm import random

pytestmark = pytest.mark.cuda

IDS = torch.tensor([7, 3, 2**40 + 3, 2**63 - 1, 0])
DRAWS = torch.tensor([0, 1, 5, 2**31, 7])


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1])
@pytest.mark.parametrize("count", [0, 1, 5, 4096, 5003])
def test_numbers_are_those_of_the_cpu(device: torch.device, distribution: str, seed: int, count: int) -> None:
    from ldm.kernels.noise import numbers

    key = seed, zlib.crc32(b"noise")
    ours = numbers(distribution, key, IDS.to(device), DRAWS.to(device), count).cpu()
    theirs = getattr(random, distribution)(seed, "noise", IDS, DRAWS, (count,))
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if distribution == "uniform":
        assert torch.equal(ours, theirs)
    else:  # logarithms may differ in the last bit of float64, which changes one number in 10⁸
        assert (ours != theirs).sum() <= 1 and torch.allclose(ours, theirs, rtol=2**-22, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_numbers_are_the_same_on_a_gpu_that_is_not_the_current_one(device: torch.device) -> None:
    with torch.cuda.device(0):
        ours = random.normal(3, "noise", IDS.to("cuda:1"), DRAWS.to("cuda:1"), (40,))
    assert torch.equal(ours.cpu(), random.normal(3, "noise", IDS.to("cuda:0"), DRAWS.to("cuda:0"), (40,)).cpu())
