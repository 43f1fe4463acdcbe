"""Which samples a rank sees, in which order: a pure function of (seed, position), so that the state is one integer."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

ROUNDS = 8  # with 4, permutations of ten samples are not equally likely


def permuted(index: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(length) sends each index (n,) uint64.

    A Feistel network on the next even power of two, walked until it falls inside: no table, whatever the
    length (Black & Rogaway 2002).
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(2**63, size=ROUNDS, dtype=np.uint64)
    result = index.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right, key) & mask)
        result[outside] = left << half | right
        outside = result >= length
    return result


def _mixed(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """SplitMix64's finaliser of x + key."""
    with np.errstate(over="ignore"):
        x = x + key
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Order(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one rank, from global position `start()` to the end of a pass of `__len__` batches.

    Position p counts samples over all ranks: it is sample permuted(p mod length) of epoch p div length. Rank r takes
    the r-th run of `batch_size` of every `batch_size` · `world`, so all ranks see equally many batches, and `length`
    positions in a row hold every sample once, whatever the number of ranks. A pass holds whole optimizer steps of
    `accumulation` batches; what is left of the epoch opens the next pass, which asks `start` again. What is permuted
    are runs of `run` samples, which stay together in their order.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        start: Callable[[], int] = lambda: 0,
        run: int = 1,
    ) -> None:
        if run < 1 or length % run:
            raise ValueError(f"{length} training samples are no whole number of data.run={run}: change one of them")
        self.length, self.batch_size, self.seed, self.run = length, batch_size, seed, run
        self.rank, self.world, self.accumulation, self.start = rank, world, accumulation, start
        if len(self) < 1:
            raise ValueError(
                f"there are {length} training samples, fewer than the {batch_size * world * accumulation} of one "
                "optimizer step; lower data.batch_size or data.global_batch, or give more data"
            )

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world * self.accumulation) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start, stride = self.start(), self.batch_size * self.world
        done = start // stride % len(self)
        for batch in range(len(self) - done):
            yield self.batch(start + batch * stride + self.rank * self.batch_size)

    def batch(self, position: int) -> list[tuple[int, int]]:
        """The (epoch, index) of `batch_size` positions from `position` on."""
        epochs, within = np.divmod(np.arange(position, position + self.batch_size), self.length)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            which, place = np.divmod(within[chosen], self.run)
            runs = permuted(which, self.length // self.run, self.seed, int(epoch)).astype(np.int64)
            within[chosen] = runs * self.run + place
        return list(zip(epochs.tolist(), within.tolist(), strict=True))
