import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing import checkpoint_file
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from tests.callbacks.tiny import Batches, Tiny, trainer


def written(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def updates(path: Path) -> int:
    """Returns the number of EMA updates in a checkpoint."""
    return int(checkpoint_file.read(path)["callbacks"]["EMA"]["updates"])


def test_checkpoints_are_saved_every_n_steps_and_at_the_end_after_the_ema_update(tmp_path: Path) -> None:
    callbacks = Checkpoint(tmp_path, every_n_train_steps=3, keep=9), EMA()
    trainer(tmp_path, *callbacks, max_steps=7).fit(Tiny(), Batches())
    steps = ["step_00000003.ckpt", "step_00000006.ckpt", "step_00000007.ckpt"]
    assert written(tmp_path) == ["last.ckpt", *steps]
    assert [updates(tmp_path / name) for name in steps] == [3, 6, 7]
    assert (tmp_path / "last.ckpt").samefile(tmp_path / steps[-1])


def test_the_newest_checkpoints_and_every_nth_one_are_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, Checkpoint(tmp_path, every_n_train_steps=1, keep=2, keep_every=3), max_steps=8)
    run.fit(Tiny(), Batches())
    assert written(tmp_path) == ["last.ckpt", *(f"step_0000000{n}.ckpt" for n in (3, 6, 7, 8))]


def test_a_checkpoint_includes_all_batches_of_an_accumulated_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, EMA(), Checkpoint(tmp_path, 1, keep=9), accumulate_grad_batches=2)
    run.fit(Tiny(), Batches())
    for step in range(1, 5):
        saved = checkpoint_file.read(tmp_path / f"step_{step:08}.ckpt")
        assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 2 * step


def test_a_checkpoint_has_the_state_of_its_step_while_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Weights(Callback):
        def on_train_batch_end(self, _: Any, module: Any, *__: Any) -> None:
            seen.append(module.weights())
            if len(seen) == 5:
                later.set()

    def write(path: Path, checkpoint: dict[str, Any]) -> None:
        assert later.wait(60)
        torch.save(checkpoint, path)

    seen: list[Tensor] = []
    later = threading.Event()
    monkeypatch.setattr(checkpoint_file, "write", write)
    trainer(tmp_path, Weights(), Checkpoint(tmp_path, 3), max_steps=5).fit(Tiny(), Batches())
    state = checkpoint_file.read(tmp_path / "step_00000003.ckpt")["state_dict"]
    assert torch.equal(nn.utils.parameters_to_vector(state.values()), seen[2])


def test_a_validation_interrupted_by_a_signal_is_repeated_on_resuming(tmp_path: Path) -> None:
    class Validated(Tiny):
        def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
            self.log("loss", self.training_step(batch, -1))
            if self.stop_at == self.trainer.global_step and index == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_validation_epoch_end(self) -> None:
            self.losses[self.trainer.global_step] = float(self.trainer.callback_metrics["loss"])

        def __init__(self, stop_at: int = 0) -> None:
            super().__init__()
            self.stop_at, self.losses = stop_at, {}

    def fit(module: Validated, folder: Path, resume: Path | None = None) -> None:
        callbacks = EMA(0.5), Checkpoint(folder)
        run = trainer(folder, *callbacks, max_steps=8, val_check_interval=2, check_val_every_n_epoch=None)
        held_out = DataLoader([{"x": row, "id": 0} for row in torch.eye(3)], batch_size=1)
        run.fit(module, Batches(), held_out, ckpt_path=resume)

    straight, resumed = Validated(), Validated()
    fit(straight, tmp_path / "a")
    with pytest.raises(SystemExit):
        fit(Validated(stop_at=4), tmp_path / "b")
    fit(resumed, tmp_path / "b", tmp_path / "b" / "last.ckpt")
    assert list(straight.losses) == [2, 4, 6, 8]
    assert resumed.losses == {step: straight.losses[step] for step in (4, 6, 8)}
    assert torch.equal(resumed.weights(), straight.weights())


def test_a_finished_run_resumes_exactly_with_more_epochs(tmp_path: Path) -> None:
    straight, resumed = Tiny(), Tiny()
    trainer(tmp_path, max_steps=-1, max_epochs=3).fit(straight, Batches())
    trainer(tmp_path, Checkpoint(tmp_path), max_steps=-1, max_epochs=2).fit(Tiny(), Batches())
    again = trainer(tmp_path, max_steps=-1, max_epochs=3)
    again.fit(resumed, Batches(), ckpt_path=tmp_path / "last.ckpt")
    assert again.global_step == 18
    assert torch.equal(resumed.weights(), straight.weights())


def test_epochs_are_counted_correctly_after_several_resumes_at_their_end(tmp_path: Path) -> None:
    for steps, epochs in ((6, 1), (12, 2), (18, 3), (20, 3)):
        last = tmp_path / "last.ckpt"
        run = trainer(tmp_path, Checkpoint(tmp_path), max_steps=steps)
        run.fit(Tiny(), Batches(), ckpt_path=last if last.exists() else None)
        assert run.current_epoch == (epochs if steps % 6 == 0 else epochs + 1)


class Full:
    """A file on a disk with 1000 free bytes."""

    def __init__(self, path: Path, mode: str, **_: Any) -> None:
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


def test_a_full_disk_keeps_the_previous_checkpoint_and_fails_the_run_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path, Checkpoint(tmp_path)).fit(Tiny(), Batches())
    previous = (tmp_path / "last.ckpt").read_bytes()
    monkeypatch.setattr("ldm.files.open", Full, raising=False)
    run = trainer(tmp_path, Checkpoint(tmp_path, every_n_train_steps=2), max_steps=5)
    with (
        pytest.warns(UserWarning, match=r"step 2 was not saved.*is full.*previous .*last.ckpt is kept"),
        pytest.raises(OSError, match=r"the last checkpoint, of step 5, was not saved .* free disk space"),
    ):
        run.fit(Tiny(), Batches())
    assert run.global_step == 5
    assert (tmp_path / "last.ckpt").read_bytes() == previous
    assert written(tmp_path) == ["last.ckpt", "step_00000004.ckpt"]


def test_other_write_errors_are_raised(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        trainer(tmp_path, Checkpoint(tmp_path / "file")).fit(Tiny(), Batches())


def test_a_killed_process_keeps_the_old_file_and_the_next_run_deletes_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint_file.write(path, {"global_step": 1})

    def save_half(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        if (child := os.fork()) == 0:
            checkpoint_file.write(path, {"global_step": 2})
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert checkpoint_file.read(path) == {"global_step": 1}
    assert len(written(tmp_path)) == 2
    (tmp_path / ".last.ckpt.link.tmp").touch()  # of a process that was killed between linking and renaming
    trainer(tmp_path, Checkpoint(tmp_path), max_steps=1).fit(Tiny(), Batches())
    assert written(tmp_path) == ["last.ckpt", "step_00000001.ckpt"]


def test_files_with_names_similar_to_checkpoints_are_kept(tmp_path: Path) -> None:
    theirs = ["step_00000001_best.ckpt", "step_1.ckpt", "step_00000001.ckpt.md5", ".notes.tmp", ".notes.01234567.tmp"]
    for name in theirs:
        (tmp_path / name).touch()
    trainer(tmp_path, Checkpoint(tmp_path, every_n_train_steps=1, keep=1)).fit(Tiny(), Batches())
    assert written(tmp_path) == sorted([*theirs, "last.ckpt", "step_00000004.ckpt"])


def test_last_ckpt_is_a_copy_if_the_file_system_has_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    trainer(tmp_path, Checkpoint(tmp_path)).fit(Tiny(), Batches())
    assert (tmp_path / "last.ckpt").read_bytes() == (tmp_path / "step_00000004.ckpt").read_bytes()
    assert written(tmp_path) == ["last.ckpt", "step_00000004.ckpt"]
