"""Builds the data loaders for training and validation and tracks the training position for resuming."""

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

from ldm.data.latents.in_memory import InMemory
from ldm.data.loading import worker
from ldm.data.loading.order import BucketOrder, Order
from ldm.data.sources.tolerant import BadSamples

Sample = dict[str, Any]
Tokenize = Callable[[list[str]], Tensor]


def collate(samples: list[Sample], tokenizer: Tokenize | None = None) -> dict[str, Any]:
    """Stacks tensors and numbers into tensors; text and lists stay lists.

    With a tokenizer the batch also has "tokens" (b, n), the tokens of its captions, unless it has their "states".
    """
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        column = [sample[name] for sample in samples]
        batch[name] = column if isinstance(first, str | list) else default_collate(column)
    if tokenizer is None or "caption" not in batch or "states" in batch:
        return batch
    return {**batch, "tokens": tokenizer(batch["caption"])}


class Numbered(Dataset[Sample]):
    """The first `length` samples of a data set by (epoch, index), with the epoch added as "draw", the key of the noise.

    If `same`, every epoch has the same samples, else a mixture or random crops change from epoch to epoch. `readers`
    is the number of threads that read the samples of a batch in parallel, to overlap their latencies.
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
    """Loads `train` in a shuffled order that resumes exactly, and each data set of `val` in its own order.

    Args:
        batch_size: samples per batch and rank.
        global_batch: samples per optimizer step, reached by gradient accumulation; a multiple of batch_size · ranks.
        workers: processes that each read two batches ahead.
        readers: threads of each worker, for object storage.
        limit: number of samples to train on, the same samples with the same crops in every epoch.
        max_bad_share: share of unreadable samples beyond which training stops.
        bucketed: every optimizer step has images of a single size.
        run: number of consecutive samples that shuffling keeps together.
        tokenize: the loader tokenizes the captions, in its workers if there are any; None: if the module reads them.

    The state is one integer, the number of samples that all ranks together have trained on.
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
        tokenize: bool | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, not {batch_size}")
        if bucketed and (global_batch is None or limit is not None or run > 1):
            raise ValueError(
                "data.bucketed=true needs data.global_batch, so that steps do not depend on the number of GPUs, and "
                "works with neither data.limit nor data.run: set data.global_batch and remove the others"
            )
        size = len(train)  # type: ignore[arg-type]
        if size == 0:
            raise ValueError(
                "the training data set is empty: set data.shards=, data.root= or data.cache= to a place with samples"
            )
        self.train = Numbered(train, size if limit is None else min(limit, size), limit is not None, readers)
        self.val, self.val_batch_size = val, val_batch_size or batch_size
        self.batch_size, self.global_batch, self.workers, self.seed = batch_size, global_batch, workers, seed
        self.run, self.bucketed, self.tokenize = run, bucketed, tokenize
        self.seen = 0
        self.bad = BadSamples(max_bad_share, len(self.train))

    def accumulation(self, world: int) -> int:
        """Returns the number of batches per optimizer step. Raises ValueError if it is not an integer."""
        if self.global_batch is None:
            return 1
        steps, rest = divmod(self.global_batch, self.batch_size * world)
        if rest or steps < 1:
            raise ValueError(
                f"data.global_batch={self.global_batch} is not a multiple of data.batch_size={self.batch_size} "
                f"x {world} ranks; change one of them"
            )
        return steps

    def samples_of_each_size(self) -> Iterator[Sample]:
        """Yields a sample of every size from each data set, or one sample from each if batches are not `bucketed`."""
        for dataset in (self.train.dataset, *self.val.values()):
            buckets = dataset.buckets if self.bucketed else [0]  # type: ignore[attr-defined]
            for index in np.unique(buckets, return_index=True)[1].tolist():
                yield dataset[index]

    def train_dataloader(self) -> DataLoader[Sample]:
        if isinstance(self.train.dataset, InMemory):
            self.train.dataset.load()  # after all checks of the run, and before the workers start
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        steps = self.accumulation(world)
        arguments = (self.batch_size, self.seed, rank, world, steps, lambda: self.seen)
        if self.bucketed:
            buckets = self.train.dataset.buckets  # type: ignore[attr-defined]
            return self._loader(self.train, batch_sampler=BucketOrder(buckets, *arguments))
        return self._loader(self.train, batch_sampler=Order(len(self.train), *arguments, self.run))

    def val_dataloader(self) -> list[DataLoader[Sample]]:
        return [self._val_loader(dataset) for dataset in self.val.values()]

    def _val_loader(self, dataset: Any) -> DataLoader[Sample]:
        if not self.bucketed:
            return self._loader(dataset, batch_size=self.val_batch_size)
        members = [np.flatnonzero(dataset.buckets == bucket).tolist() for bucket in np.unique(dataset.buckets)]
        batches = [m[k : k + self.val_batch_size] for m in members for k in range(0, len(m), self.val_batch_size)]
        return self._loader(dataset, batch_sampler=batches)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Adds "first", the id and draw of the first sample as integers, which could later only be read back."""
        return {**batch, "first": (int(batch["id"][0]), int(batch["draw"][0]))} if "draw" in batch else batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Adds the strata and counts the samples trained on; counted here because workers read ahead of training."""
        if self.trainer is not None and self.trainer.training:
            strata = self._strata(self.trainer.world_size, self.trainer.global_rank, batch["id"].device)
            batch = {**batch, "stratum": strata}
            self.seen += self.batch_size * self.trainer.world_size
            self.bad.count(batch.get("bad", []))
        return batch

    def _strata(self, world: int, rank: int, device: torch.device | None = None) -> Tensor:
        """Returns each sample's stratum and the number of strata, (b, 2); a global batch has one sample per stratum.

        A stride near the golden ratio spreads the strata of each rank, and of each accumulated batch.
        """
        size = self.batch_size * world * self.accumulation(world)
        stride = next(step for step in range(round(0.618 * size), size + 1) if gcd(step, size) == 1)
        position = self.seen + rank * self.batch_size + torch.arange(self.batch_size, device=device)
        stratum = position % size * stride % size
        return torch.stack((stratum, torch.full_like(stratum, size)), dim=1)

    def _tokenizer(self) -> Tokenize | None:
        """Returns the tokenizer of the trained module, or None if the batches get no tokens."""
        module = getattr(self.trainer, "lightning_module", None)
        tokenize: Tokenize | None = getattr(module, "tokenize", None)
        if self.tokenize and tokenize is None:
            raise ValueError(f"data.tokenize=true, but {type(module).__name__} reads no captions: remove the setting")
        return None if self.tokenize is False else tokenize

    def _loader(self, dataset: Dataset[Sample], **options: Any) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            collate_fn=partial(collate, tokenizer=self._tokenizer()),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
            worker_init_fn=worker.initialize,
            **options,
        )

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]
