import logging
import os
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from ldm.callbacks.monitoring.early_log import EarlyLog
from ldm.callbacks.monitoring.log_file import LOG, log_file
from ldm.callbacks.monitoring.run_log import RunLog
from tests.callbacks.ranks import train_on_two
from tests.callbacks.tiny import Batches, Tiny, trainer

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d (rank \d+(?: worker \d+)?) ([A-Z]+) (.*)")


def messages(folder: Path) -> list[tuple[str, str, str]]:
    """Returns rank, level and text of each line."""
    matches = [LINE.fullmatch(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [(match[1], match[2], match[3]) for match in matches if match]


def test_warnings_and_library_messages_are_logged_with_their_rank_and_still_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    with pytest.warns(UserWarning, match="caption"), log_file(tmp_path) as file:
        warnings.warn("no caption", stacklevel=1)
        file.open(3)
        logging.getLogger("some.library").warning("from a library")
        LOG.info("from ldm")
    logged = messages(tmp_path)
    assert logged[0][:2] == ("rank 3", "WARNING") and logged[0][2].startswith("UserWarning: no caption (monitoring/")
    assert logged[1:] == [("rank 3", "WARNING", "from a library"), ("rank 3", "INFO", "from ldm")]
    assert capsys.readouterr().err == "from a library\n"


def test_a_run_that_never_starts_leaves_no_log(tmp_path: Path) -> None:
    with log_file(tmp_path), pytest.warns(UserWarning):
        warnings.warn("refused later", stacklevel=1)
    assert not (tmp_path / "log.txt").exists()


def test_a_resumed_run_continues_the_log_on_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("a line that a kill cut o")
    for rank in (0, 1):
        with log_file(tmp_path) as file:
            file.open(rank)
            LOG.info("started")
    assert (tmp_path / "log.txt").read_text().startswith("a line that a kill cut o\n")
    assert [rank for rank, _, _ in messages(tmp_path)] == ["rank 0", "rank 1"]


def test_messages_that_cannot_be_written_are_written_once_they_can(tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()
    with log_file(tmp_path) as file:
        file.open(0)
        LOG.info("first")
        (tmp_path / "log.txt").rmdir()
        LOG.info("second")
    assert [text for _, _, text in messages(tmp_path)] == ["first", "second"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_does_not_fail_a_message(tmp_path: Path) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with log_file(tmp_path) as file:
        file.open(0)
        LOG.info("first")
        (tmp_path / "log.txt").unlink()
        LOG.info("second")
    assert [text for _, _, text in messages(tmp_path)] == ["first", "second"]


def test_a_forked_process_logs_its_own_messages_only(tmp_path: Path) -> None:
    with log_file(tmp_path) as file:
        LOG.info("of the parent")
        file._rank = 0
        if not (child := os.fork()):
            LOG.info("of the child")
            os._exit(0)
        os.waitpid(child, 0)
        assert [text for _, _, text in messages(tmp_path)] == ["of the child"]


def test_an_error_is_logged_with_its_traceback(tmp_path: Path) -> None:
    class Broken(Tiny):
        def training_step(self, *_: object) -> None:  # type: ignore[override]
            raise FloatingPointError("the loss is odd")

    with log_file(tmp_path) as file, pytest.raises(FloatingPointError):
        trainer(tmp_path, RunLog(file)).fit(Broken(), Batches())
    text = (tmp_path / "log.txt").read_text()
    assert messages(tmp_path)[-1][1:] == ("ERROR", "failed after step 0")
    assert "Traceback (most recent call last)" in text and text.endswith("FloatingPointError: the loss is odd\n")


class InSetUp(Callback):
    """Calls a function after the log was opened and before training starts."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def on_sanity_check_start(self, *_: object) -> None:
        self.action()


class Validated(Tiny):
    def validation_step(self, *_: object) -> None:
        """Does nothing."""


def set_up(folder: Path, action: Callable[[], object]) -> None:
    with log_file(folder) as file:
        callbacks = RunLog(file), EarlyLog(file), InSetUp(action)
        trainer(folder, *callbacks, num_sanity_val_steps=1).fit(Validated(), Batches(), Batches())


def test_a_process_that_is_killed_in_set_up_leaves_its_log(tmp_path: Path) -> None:
    if not (child := os.fork()):
        set_up(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert messages(tmp_path)[-1][2].startswith("setting up: process ")


@pytest.mark.parametrize("earlier", [None, "", "of an earlier process\n", "of a process that was kil"])
def test_a_run_that_is_refused_in_set_up_leaves_the_log_as_it_was(tmp_path: Path, earlier: str | None) -> None:
    def refuse() -> None:
        assert messages(tmp_path)
        raise ValueError("refused")

    if earlier is not None:
        (tmp_path / "log.txt").write_text(earlier)
    with pytest.raises(ValueError, match="refused"):
        set_up(tmp_path, refuse)
    assert [file.read_text() for file in tmp_path.glob("log.txt")] == [earlier or ""][: bool(earlier)]


def test_a_run_that_fails_in_training_keeps_its_log(tmp_path: Path) -> None:
    class Refuses(Tiny):
        def training_step(self, *_: object) -> None:  # type: ignore[override]
            raise ValueError("not finite")

    with log_file(tmp_path) as file, pytest.raises(ValueError, match="not finite"):
        trainer(tmp_path, RunLog(file), EarlyLog(file)).fit(Refuses(), Batches())
    assert "failed after step 0" in [text for _, _, text in messages(tmp_path)]


def test_every_rank_logs_to_one_file(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with log_file(tmp_path) as file:
            how = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
            trainer(tmp_path, RunLog(file), max_steps=1, **how).fit(Tiny(), Batches())
            warnings.warn(f"by {rank}", stacklevel=1)

    codes, stderr = train_on_two(tmp_path, work)
    assert codes == [0, 0], stderr
    assert {rank for rank, _, text in messages(tmp_path) if text.startswith("training from step 0")} == {
        "rank 0",
        "rank 1",
    }
    for rank in (0, 1):
        assert any(source == f"rank {rank}" and f"by {rank}" in text for source, _, text in messages(tmp_path))
