import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ldm.callbacks.monitoring.watchdog import Watchdog
from tests.callbacks.ranks import train_on_two
from tests.callbacks.tiny import Batches, Tiny, trainer


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.callbacks.monitoring.watchdog.GRACE", 1.0)


def fit(folder: Path, module: Tiny, batches: Any, seconds: float) -> None:
    run = trainer(folder, Watchdog(seconds), devices=2, strategy="ddp", use_distributed_sampler=False)
    run.fit(module, batches)


def test_a_rank_that_raises_ends_the_other_ranks_and_is_named(tmp_path: Path) -> None:
    class Failing(Tiny):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            if index == 2 and self.global_rank == 1:
                raise ZeroDivisionError("no such luck")
            return super().training_step(batch, index)

    codes, stderr = train_on_two(tmp_path, lambda rank: fit(tmp_path, Failing(), Batches(), 60))
    assert codes == [1, 1]
    assert "rank 1 of 2 failed: ZeroDivisionError: no such luck" in stderr
    assert "rank 1 of 2 failed: ZeroDivisionError: no such luck (rank 0 stops because of this)" in stderr


@pytest.mark.slow
def test_a_rank_that_runs_out_of_data_ends_the_other_ranks_and_is_named(tmp_path: Path) -> None:
    class Dry(Batches):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for number, batch in enumerate(super().__iter__()):
                if number == 2:
                    pause.wait()
                yield batch

    def work(rank: int) -> None:
        fit(tmp_path, Tiny(), Dry() if rank else Batches(), 2)

    pause = threading.Event()
    codes, stderr = train_on_two(tmp_path, work)
    assert codes == [1, 1]
    assert "rank 1 fell behind or ran out of data (batches started and finished: rank 0: 6, rank 1: " in stderr
