import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from ldm.callbacks.ema import EMA
from tests.callbacks.tiny import Batches, Tiny, trainer


class Recorded(AtomicCheckpointIO):
    """Notes the step of each save, and how many updates the average had then."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.updates: list[int] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.steps.append(checkpoint["global_step"])
        self.updates.append(checkpoint["callbacks"]["EMA"]["updates"])
        super().save_checkpoint(checkpoint, path)


def test_it_saves_every_n_steps_and_at_the_end_after_the_average_took_in_the_step(tmp_path: Path) -> None:
    io, last = Recorded(), tmp_path / "checkpoints" / "last.ckpt"
    callbacks = Checkpoint(last.parent, every_n_train_steps=3), EMA()
    trainer(tmp_path, *callbacks, max_steps=7, plugins=[io]).fit(Tiny(), Batches())
    assert io.steps == io.updates == [3, 6, 7]
    assert os.listdir(last.parent) == ["last.ckpt"] and not last.is_symlink()


def test_a_step_of_several_batches_is_saved_once_and_whole(tmp_path: Path) -> None:
    io = Recorded()
    run = trainer(tmp_path, EMA(), Checkpoint(tmp_path, 1), plugins=[io], accumulate_grad_batches=2)
    run.fit(Tiny(), Batches())
    assert io.steps == io.updates == [1, 2, 3, 4]


def test_a_run_that_ended_with_its_epochs_goes_on_exactly_with_more(tmp_path: Path) -> None:
    straight, resumed = Tiny(), Tiny()
    trainer(tmp_path, max_steps=-1, max_epochs=3).fit(straight, Batches())
    trainer(tmp_path, Checkpoint(tmp_path), max_steps=-1, max_epochs=2).fit(Tiny(), Batches())
    again = trainer(tmp_path, max_steps=-1, max_epochs=3)
    again.fit(resumed, Batches(), ckpt_path=tmp_path / "last.ckpt")
    assert again.global_step == 18
    assert torch.equal(resumed.weights(), straight.weights())


class Full:
    """A file on a disk with room for 1000 more bytes."""

    def __init__(self, path: Path, mode: str) -> None:
        self.file, self.room = open(path, mode), 1000  # noqa: SIM115

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def test_a_full_disk_is_told_and_training_goes_on_with_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path, Checkpoint(tmp_path)).fit(Tiny(), Batches())
    whole = (tmp_path / "last.ckpt").read_bytes()
    monkeypatch.setattr("ldm.files.open", Full, raising=False)
    run = trainer(tmp_path, Checkpoint(tmp_path, every_n_train_steps=2), max_steps=5)
    with pytest.warns(UserWarning, match=r"STEP 2 WAS NOT SAVED.*is full.*older checkpoint there is kept"):
        run.fit(Tiny(), Batches())
    assert run.global_step == 5
    assert (tmp_path / "last.ckpt").read_bytes() == whole and os.listdir(tmp_path) == ["last.ckpt"]


def test_other_failures_to_write_are_raised(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / "file" / "last.ckpt")


def test_a_process_killed_while_it_saves_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, path)

    def save_half(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(torch, "save", save_half)
    if (child := os.fork()) == 0:
        AtomicCheckpointIO().save_checkpoint({"global_step": 2}, path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert AtomicCheckpointIO().load_checkpoint(path) == {"global_step": 1}


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Batches()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt is no checkpoint.*more than plain data"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)


@pytest.mark.parametrize("kept", [0, 100, 1200])
def test_a_checkpoint_that_was_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    torch.save({"x": torch.zeros(1000)}, tmp_path / "last.ckpt")
    os.truncate(tmp_path / "last.ckpt", kept)
    with pytest.raises(ValueError, match=r"last\.ckpt is no checkpoint, is cut short"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


def test_a_missing_checkpoint_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")
