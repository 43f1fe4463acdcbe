"""Batches for training and validation, and where in the data a run stands."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import gcd
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ldm.data.loading import worker
from ldm.data.loading.order import BucketOrder, Order
from ldm.data.sources.tolerant import BadSamples

Sample = dict[str, Any]
Tokenize = Callable[[list[str]], Tensor]


def collate(samples: list[Sample], tokenizer: Tokenize | None = None) -> dict[str, Any]:
    """Stacks tensors and numbers; text, and the reasons why samples were replaced, stay lists.

    With a tokenizer the batch has "tokens" (b, n) of the captions too.
    """
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        column = [sample[name] for sample in samples]
        batch[name] = column if isinstance(first, str | list) else default_collate(column)
    return batch if tokenizer is None else {**batch, "tokens": tokenizer(batch["caption"])}


class Numbered(Dataset[Sample]):
    """The first `length` of a data set, asked by (epoch, index); the epoch is "draw", which keys the randomness.

    `same` are the samples of every epoch if so, which those of a mixture or with random crops otherwise are not.
    With `readers` the samples of a batch are read at once, so that what each waits for, it waits for together.
    """

    def __init__(self, dataset: Dataset[Sample], length: int, same: bool = False, readers: int = 0) -> None:
        self.dataset, self.length, self.same, self.readers = dataset, length, same, readers

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        draw, index = key
        return {**self.dataset[0 if self.same else draw, index], "draw": draw}

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample]:
        if not self.readers:
            return [self[key] for key in keys]
        with ThreadPoolExecutor(self.readers) as pool:
            return list(pool.map(self.__getitem__, keys))


class DataModule(LightningDataModule):
    """`train` in a shuffled order that resumes to the sample; each of `val`, by name, in its own order.

    `batch_size` is a rank's; `global_batch`, if given, must be a multiple of batch_size · ranks and is reached by
    accumulating gradients. `limit` trains on the first so many samples only, and on the same pictures of them. Each of
    `workers` processes reads two batches ahead, with `readers` threads (for object storage). The state is one integer:
    how many samples all ranks together have trained on. If `bucketed`, every optimizer step is of pictures of one size.
    If `tokenize`, the workers make the tokens of captions, ahead of the step that reads them.
    """

    def __init__(
        self,
        train: Dataset[Sample],
        val: dict[str, Dataset[Sample]],
        batch_size: int,
        global_batch: int | None = None,
        val_batch_size: int | None = None,
        workers: int = 0,
        readers: int = 0,
        seed: int = 0,
        limit: int | None = None,
        max_bad_share: float = 0.01,
        bucketed: bool = False,
        run: int = 1,
        tokenize: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, not {batch_size}")
        if bucketed and (global_batch is None or limit is not None or run > 1):
            raise ValueError(
                "data.bucketed=true makes every optimizer step of one size, whatever the number of GPUs: give "
                "data.global_batch, and neither data.limit nor data.run"
            )
        size = len(train)  # type: ignore[arg-type]
        if size == 0:
            raise ValueError(
                "the training data set is empty; give data.shards=, data.root= or data.cache= with samples"
            )
        self.train = Numbered(train, size if limit is None else min(limit, size), limit is not None, readers)
        self.val, self.val_batch_size = val, val_batch_size or batch_size
        self.batch_size, self.global_batch, self.workers, self.seed = batch_size, global_batch, workers, seed
        self.run, self.bucketed, self.tokenize = run, bucketed, tokenize
        self.seen = 0
        self.bad = BadSamples(max_bad_share, len(self.train))

    def accumulation(self, world: int) -> int:
        """Batches per optimizer step. Raises ValueError where the global batch does not divide."""
        if self.global_batch is None:
            return 1
        steps, rest = divmod(self.global_batch, self.batch_size * world)
        if rest or steps < 1:
            raise ValueError(
                f"data.global_batch={self.global_batch} is no multiple of data.batch_size={self.batch_size} "
                f"x {world} ranks; change one of them"
            )
        return steps

    def samples_of_each_size(self) -> Iterator[Sample]:
        """A training sample and a validation sample of every size, which is one where batches are not `bucketed`."""
        for dataset in (self.train.dataset, *self.val.values()):
            buckets = dataset.buckets if self.bucketed else [0]  # type: ignore[attr-defined]
            for index in np.unique(buckets, return_index=True)[1].tolist():
                yield dataset[index]

    def train_dataloader(self) -> DataLoader[Sample]:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        steps = self.accumulation(world)
        how = (self.batch_size, self.seed, rank, world, steps, lambda: self.seen)
        if self.bucketed:
            buckets = self.train.dataset.buckets  # type: ignore[attr-defined]
            return self._loader(self.train, batch_sampler=BucketOrder(buckets, *how))
        return self._loader(self.train, batch_sampler=Order(len(self.train), *how, self.run))

    def val_dataloader(self) -> list[DataLoader[Sample]]:
        return [self._val_loader(dataset) for dataset in self.val.values()]

    def _val_loader(self, dataset: Any) -> DataLoader[Sample]:
        if not self.bucketed:
            return self._loader(dataset, batch_size=self.val_batch_size)
        alike = [np.flatnonzero(dataset.buckets == bucket).tolist() for bucket in np.unique(dataset.buckets)]
        batches = [m[k : k + self.val_batch_size] for m in alike for k in range(0, len(m), self.val_batch_size)]
        return self._loader(dataset, batch_sampler=batches)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Counts what is trained on here, because workers fetch ahead of it."""
        if self.trainer is not None and self.trainer.training:
            batch = {**batch, "stratum": self._strata(self.trainer.world_size, self.trainer.global_rank)}
            self.seen += self.batch_size * self.trainer.world_size
            self.bad.count(batch.get("bad", []))
        return batch

    def _strata(self, world: int, rank: int) -> Tensor:
        """(b, 2): which of how many strata is each sample's, one each for the samples of a global batch.

        Strides near the golden ratio give each rank, and each accumulated batch, strata far apart.
        """
        size = self.batch_size * world * self.accumulation(world)
        stride = next(step for step in range(round(0.618 * size), size + 1) if gcd(step, size) == 1)
        place = self.seen + rank * self.batch_size + torch.arange(self.batch_size)
        which = place % size * stride % size
        return torch.stack((which, torch.full_like(which, size)), dim=1)

    def _tokenizer(self) -> Tokenize:
        """The trained module's own."""
        module = self.trainer and self.trainer.lightning_module
        if not hasattr(module, "tokenize"):
            raise ValueError(f"data.tokenize=true, but {type(module).__name__} reads no captions: leave it out")
        return module.tokenize  # type: ignore[union-attr, return-value]

    def _loader(self, dataset: Dataset[Sample], **how: Any) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            collate_fn=partial(collate, tokenizer=self._tokenizer()) if self.tokenize else collate,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
            worker_init_fn=worker.initialize,
            **how,
        )

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]
