from pathlib import Path

import pytest

from ldm.callbacks.running import Running
from ldm.files import is_locked
from tests.callbacks.tiny import Batches, Tiny, trainer


class Look(Running):
    """Looks, in the midst of training, whether the folder is locked."""

    def on_train_start(self, *_: object) -> None:
        self.seen = is_locked(self.folder)


def test_others_see_that_a_run_lives_and_that_it_has_ended(tmp_path: Path) -> None:
    look = Look(tmp_path)
    trainer(tmp_path, look).fit(Tiny(), Batches())
    assert look.seen and not is_locked(tmp_path)


def test_a_run_that_fails_lets_go_of_its_folder(tmp_path: Path) -> None:
    class Fails(Tiny):
        def training_step(self, *_: object) -> None:  # type: ignore[override]
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        trainer(tmp_path, Running(tmp_path)).fit(Fails(), Batches())
    assert not is_locked(tmp_path)


def test_a_folder_in_which_another_trains_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.callbacks.running.PATIENCE", 0.01)
    inner = pytest.raises(ValueError, match=r"another process is training in .*: wait for it, or give another run_dir")

    class Second(Tiny):
        def on_train_start(self) -> None:
            with inner:
                trainer(tmp_path, Running(tmp_path)).fit(Tiny(), Batches())

    trainer(tmp_path, Running(tmp_path)).fit(Second(), Batches())


def test_a_folder_without_a_lock_is_free(tmp_path: Path) -> None:
    assert not is_locked(tmp_path) and not is_locked(tmp_path / "nowhere")
