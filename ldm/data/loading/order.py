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
        epochs, indices = self.shuffled(position, self.length)
        return list(zip(epochs.tolist(), indices.tolist(), strict=True))

    def shuffled(self, position: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and indices, each (batch_size,), from `position` on of passes through `length` samples."""
        epochs, within = np.divmod(np.arange(position, position + self.batch_size), length)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            which, place = np.divmod(within[chosen], self.run)
            runs = permuted(which, length // self.run, self.seed, int(epoch)).astype(np.int64)
            within[chosen] = runs * self.run + place
        return epochs, within


class BucketOrder(Order):
    """An order in which each optimizer step is of one bucket; `buckets` (n,) numbers the bucket of each sample.

    Each bucket goes round by itself, shuffled anew each time, and is cut into steps of g samples: by the end of
    epoch e a bucket of n samples has had (e + 1)·n // g of them. The steps that an epoch adds come in random order,
    those of all buckets mixed. So every (epoch, index) comes once, less than a step of each bucket is left for the
    next epoch, and the stream depends on g alone: not on how it is shared among ranks and accumulated batches.
    """

    def __init__(
        self,
        buckets: np.ndarray,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        start: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(len(buckets), batch_size, seed, rank, world, accumulation, start)
        self.step = self.batch_size * self.world * self.accumulation
        self.members = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
        self.sizes = np.array([len(members) for members in self.members])

    def batch(self, position: int) -> list[tuple[int, int]]:
        step, offset = divmod(position, self.step)
        bucket, turn = self._bucket(step)
        epochs, places = self.shuffled(turn * self.step + offset, len(self.members[bucket]))
        return list(zip(epochs.tolist(), self.members[bucket][places].tolist(), strict=True))

    def _bucket(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps that bucket had before it."""
        epoch = step * self.step // self.length
        while self._before(epoch + 1).sum() <= step:
            epoch += 1
        before, after = self._before(epoch), self._before(epoch + 1)
        added = after - before
        place = int(permuted(np.array([step - before.sum()]), int(added.sum()), self.seed, epoch)[0])
        bucket = int(np.searchsorted(np.cumsum(added), place, "right"))
        return bucket, int(before[bucket]) + place - int(added[:bucket].sum())

    def _before(self, epoch: int) -> np.ndarray:
        """How many steps each bucket has had when an epoch begins."""
        return epoch * self.sizes // self.step
