"""Orders the samples for each rank as a pure function of (seed, position), so that the state is one integer."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

ROUNDS = 8  # with 4, permutations of ten samples are not equally likely


def permuted(index: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """Applies a pseudo-random permutation of range(length) to each index; returns (n,) uint64.

    Uses a Feistel network on the next even power of two, iterated until the value is below `length` (cycle walking,
    Black & Rogaway 2002), which needs no table for any length.
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
    """Applies the finaliser of SplitMix64 to x + key."""
    with np.errstate(over="ignore"):
        x = x + key
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Order(Sampler[list[tuple[int, int]]]):
    """Yields batches of (epoch, index) for one rank, from global position `start()` to the end of a pass.

    Position p counts samples over all ranks: it is sample permuted(p mod length) of epoch p div length. Rank r takes
    the r-th block of `batch_size` positions of every `batch_size` · `world`, so all ranks see the same number of
    batches, and the `length` positions of an epoch contain every sample once, for any number of ranks. A pass has
    `len(self)` batches, a multiple of `accumulation`, so that it consists of complete optimizer steps. The rest of the
    epoch opens the next pass, which calls `start` again. Runs of `run` consecutive samples are permuted as units.
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
            raise ValueError(f"{length} training samples are not a multiple of data.run={run}: change one of them")
        self.length, self.batch_size, self.seed, self.run = length, batch_size, seed, run
        self.rank, self.world, self.accumulation, self.start = rank, world, accumulation, start
        if len(self) < 1:
            raise ValueError(
                f"there are {length} training samples, fewer than the {batch_size * world * accumulation} of one "
                "optimizer step; lower data.batch_size or data.global_batch, or add data"
            )

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world * self.accumulation) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start, stride = self.start(), self.batch_size * self.world
        done = start // stride % len(self)
        for batch in range(len(self) - done):
            yield self.batch(start + batch * stride + self.rank * self.batch_size)

    def batch(self, position: int) -> list[tuple[int, int]]:
        """Returns the (epoch, index) of `batch_size` consecutive positions from `position`."""
        epochs, indices = self.shuffled(position, self.length)
        return list(zip(epochs.tolist(), indices.tolist(), strict=True))

    def shuffled(self, position: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns epochs and indices, each (batch_size,), from `position` in repeated epochs of `length` samples."""
        epochs, within = np.divmod(np.arange(position, position + self.batch_size), length)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            run, offset = np.divmod(within[chosen], self.run)
            runs = permuted(run, length // self.run, self.seed, int(epoch)).astype(np.int64)
            within[chosen] = runs * self.run + offset
        return epochs, within


class BucketOrder(Order):
    """An order in which each optimizer step has samples of one bucket; `buckets` (n,) is the bucket of each sample.

    Each bucket is iterated on its own, reshuffled every epoch, and divided into steps of g samples: by the end of epoch
    e a bucket of n samples has contributed (e + 1)·n // g steps. The steps that an epoch adds are in random order, with
    all buckets mixed. Every (epoch, index) occurs once, less than one step of each bucket is left for the next epoch,
    and the stream depends only on g, not on the number of ranks or accumulated batches.
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
        """Returns the bucket of a step and the number of earlier steps of that bucket."""
        epoch = step * self.step // self.length
        while self._before(epoch + 1).sum() <= step:
            epoch += 1
        before, after = self._before(epoch), self._before(epoch + 1)
        added = after - before
        place = int(permuted(np.array([step - before.sum()]), int(added.sum()), self.seed, epoch)[0])
        bucket = int(np.searchsorted(np.cumsum(added), place, "right"))
        return bucket, int(before[bucket]) + place - int(added[:bucket].sum())

    def _before(self, epoch: int) -> np.ndarray:
        """Returns the number of steps of each bucket before an epoch begins."""
        return epoch * self.sizes // self.step
