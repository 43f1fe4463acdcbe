"""Loading stopped and resumed at random, on other numbers of ranks and workers, gives every sample once per epoch.

Each sample has two captions, and the epoch decides which one is used.
"""

import os
import random
import socket
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO, Checkpoint
from ldm.data.loading.datamodule import DataModule
from ldm.data.sources.captions import choose_caption
from ldm.data.sources.shards import Shards
from ldm.data.sources.split import Split
from ldm.data.sources.tolerant import Tolerant
from tests.data.tars import samples, write_tar

Key = tuple[int, int]
COUNTS = (23, 0, 41, 7, 30)  # samples of the shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for k, count in enumerate(COUNTS):
        first = sum(COUNTS[:k])
        others = {f"{n:04d}.json": b'{"caption": "another"}' for n in range(first, first + count)}
        write_tar(folder / f"x-{k}.tar", samples(count, first) | others | ({"0003.png": b"bad"} if k == 0 else {}))
    return folder


def data(folder: Path, batch_size: int, workers: int = 0, seed: int = 0) -> DataModule:
    train = Tolerant(Split(Shards(folder, 8, captions=["txt", "json"], seed=seed), "train", every=10))
    return DataModule(train, {}, batch_size, workers=workers, seed=seed, max_bad_share=1)  # type: ignore[arg-type]


def pull(folder: Path, seen: int, batches: int, batch_size: int, world: int, workers: int, seed: int) -> list[Key]:
    """Returns the (epoch, index) of the next batches of all ranks, in the order of the ranks; workers read ahead."""
    ranks = []
    for rank in range(world):
        module = data(folder, batch_size, workers, seed)
        module.trainer = SimpleNamespace(world_size=world, global_rank=rank, training=True)  # type: ignore[assignment]
        module.load_state_dict({"seen": seen})
        keys = []
        for batch in islice(module.train_dataloader(), batches):
            module.on_after_batch_transfer(batch, 0)
            keys.append(list(zip(batch["draw"].tolist(), batch["id"].tolist(), strict=True)))
            captions = [choose_caption([f"shade {number}", "another"], seed, number, draw) for draw, number in keys[-1]]
            assert batch["caption"] == captions
        assert module.state_dict() == {"seen": seen + len(keys) * batch_size * world}
        ranks.append(keys)
    return [key for step in zip(*ranks, strict=True) for batch in step for key in batch]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_resuming_on_other_ranks_and_workers_gives_each_sample_once_per_epoch(seed: int, folder: Path) -> None:
    rng, stream = random.Random(seed), []
    length = len(data(folder, 1).train)
    while len(stream) < 3 * length:
        world, workers = rng.choice([1, 2, 4, 8]), rng.choice([0, 0, 0, 1, 3])
        batch_size = rng.choice([1, 2, 3])
        stream += pull(folder, len(stream), rng.randint(1, 9), batch_size, world, workers, seed)
    uninterrupted = pull(folder, 0, length, 1, 1, 0, seed)
    expected = Counter(id for _, id in uninterrupted)  # one sample is unreadable and always replaced by the same one
    for epoch in range(3):
        keys = stream[epoch * length : (epoch + 1) * length]
        assert {number for number, _ in keys} == {epoch}
        assert Counter(id for _, id in keys) == expected
    assert stream[:length] == uninterrupted and len(expected) == length - 1


class Recorder(LightningModule):
    """Each rank records the samples of each completed step in its own file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight, self.folder = nn.Parameter(torch.zeros(())), folder

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        with open(self.folder / f"rank-{self.global_rank}.txt", "a") as file:
            file.write("".join(f"{d} {i}\n" for d, i in zip(batch["draw"].tolist(), batch["id"].tolist(), strict=True)))
        return self.weight * batch["image"].float().mean()


def run_rank(rank: int, world: int, port: int, steps: int, folder: Path, shards: Path) -> None:
    """Runs one rank of a training run over gloo until step `steps`, resumed from the checkpoint if there is one."""
    torch.set_num_threads(1)
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in names.items()} | {"NODE_RANK": "0"})
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_steps=steps,
        callbacks=[Checkpoint(folder)], plugins=[AtomicCheckpointIO()], default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    last = folder / "last.ckpt"
    (folder / str(steps)).mkdir(exist_ok=True)
    module = Recorder(folder / str(steps))
    trainer.fit(module, data(shards, 4), ckpt_path=last if last.exists() else None, weights_only=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_resuming_from_two_processes_on_one_and_on_two_skips_and_repeats_no_sample(
    folder: Path, tmp_path: Path
) -> None:
    length, total = len(data(folder, 1).train), Counter[Key]()
    stops = [(2, 7), (1, 20), (2, 32)]  # ranks and the step at which training stops: 56, 52 and 96 samples
    for world, steps in stops:
        mp.start_processes(run_rank, (world, free_port(), steps, tmp_path, folder), nprocs=world, start_method="fork")
        for rank in range(world):
            lines = (tmp_path / str(steps) / f"rank-{rank}.txt").read_text().splitlines()
            total.update((int(d), int(i)) for d, i in map(str.split, lines))
    uninterrupted = [key for epoch in range(3) for key in pull(folder, epoch * length, length, 1, 1, 0, 0)]
    assert total == Counter(uninterrupted[: 56 + 52 + 96])
