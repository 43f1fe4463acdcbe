import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from ldm.callbacks.monitoring.ranks import Ranks
from ldm.callbacks.monitoring.watchdog import Watchdog, reported_once
from ldm.errors import ReportedFailure
from tests.callbacks.ranks import train_on_two
from tests.callbacks.tiny import Batches, Tiny, trainer


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.callbacks.monitoring.watchdog.GRACE", 5.0)
    monkeypatch.setattr("ldm.callbacks.monitoring.watchdog.PAUSE", 0.1)


def fit(folder: Path, module: Tiny, batches: Any, seconds: float) -> None:
    run = trainer(folder, Watchdog(seconds), devices=2, strategy="ddp", use_distributed_sampler=False)
    run.fit(module, batches)


class Faulty(Tiny):
    """Calls `fault` in the third step on the rank `faulty`."""

    def __init__(self, faulty: int, fault: Callable[[], object]) -> None:
        super().__init__()
        self.faulty, self.fault = faulty, fault

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        if index == 2 and self.global_rank == self.faulty:
            self.fault()
        return super().training_step(batch, index)


def divide_by_zero() -> float:
    return 1 / 0


def allocate_too_much() -> Tensor:
    return torch.empty(1 << 50)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def errors(folder: Path, faulty: int, fault: Callable[[], object]) -> tuple[list[int | None], list[str]]:
    """Trains on two ranks, one of which fails; returns their exit codes and the error messages."""

    def work(rank: int) -> None:
        trained = Faulty(faulty, fault)
        run = trainer(folder, Watchdog(60), devices=2, strategy="ddp", use_distributed_sampler=False)
        try:
            with reported_once(run):
                run.fit(trained, Batches())
        except ReportedFailure:
            sys.exit(1)

    codes, stderr = train_on_two(folder, work)
    return codes, [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("faulty", [0, 1])
def test_one_sentence_names_the_rank_that_raised_an_error(tmp_path: Path, faulty: int) -> None:
    codes, [message] = errors(tmp_path, faulty, divide_by_zero)
    rank = rf"rank {faulty} of 2 \(host {platform.node()}, process \d+\)"
    assert re.fullmatch(
        rf"error: {rank} failed with ZeroDivisionError: division by zero; fix the cause, and .* resume=auto", message
    )
    assert codes == [1, 1]


@pytest.mark.parametrize("faulty", [0, 1])
def test_one_sentence_names_the_rank_that_was_killed(tmp_path: Path, faulty: int) -> None:
    codes, [message] = errors(tmp_path, faulty, be_killed)
    assert f"rank {faulty} of 2" in message and "died without a message, as after kill -9" in message
    assert "lack of memory" in message and message.endswith("run the same command with resume=auto")
    assert codes[faulty] == -signal.SIGKILL and codes[1 - faulty] == 1


def test_a_rank_out_of_memory_is_named_with_the_setting_to_change(tmp_path: Path) -> None:
    _, [message] = errors(tmp_path, 1, allocate_too_much)
    assert "rank 1 of 2" in message and "ran out of memory" in message and "lower data.batch_size" in message


def test_the_report_of_torchrun_gets_the_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    _, [message] = errors(tmp_path, 1, divide_by_zero)
    failure = ProcessFailure(1, 0, 1, str(tmp_path / "error.json"))
    assert message.removeprefix("error: ") in ChildFailedError("train.py", {1: failure}).format_msg()


def test_a_rank_whose_store_does_not_answer_ends_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Silent(HashStore):
        def set(self, key: str, value: str) -> None:
            if key.startswith("beat"):
                threading.Event().wait()
            super().set(key, value)

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("ldm.callbacks.monitoring.watchdog.GRACE", 0.1)
    monkeypatch.setattr("ldm.callbacks.monitoring.watchdog.os._exit", end)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "first-host")
    watchdog, ranks = Watchdog(0.1), Ranks(Silent(), 0, 1)
    watchdog._training = True
    threading.Thread(target=watchdog._watch, args=(ranks,), daemon=True).start()
    with pytest.raises(SystemExit):
        watchdog._watch_store(ranks)
    assert (
        "error: torchrun on first-host, through which the ranks communicate, does not answer" in capfd.readouterr().err
    )


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
    assert stderr.count("error: ") == 1
    assert re.search(r"rank 1 of 2 \(.*\) fell behind or ran out of data \(batches .*: rank 0: 6, rank 1: ", stderr)
