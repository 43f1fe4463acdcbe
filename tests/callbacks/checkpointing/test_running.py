import os
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from ldm.callbacks.checkpointing.running import Running
from ldm.files import is_locked, try_lock
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
    monkeypatch.setattr("ldm.callbacks.checkpointing.running.PATIENCE", 0.01)
    inner = pytest.raises(ValueError, match=r"another process is training in .*: wait for it, or give another run_dir")

    class Second(Tiny):
        def on_train_start(self) -> None:
            with inner:
                trainer(tmp_path, Running(tmp_path)).fit(Tiny(), Batches())

    trainer(tmp_path, Running(tmp_path)).fit(Second(), Batches())


def test_of_many_runs_that_start_at_once_in_one_folder_only_one_trains(tmp_path: Path) -> None:
    """Each process waits at a barrier right before it takes the lock, many times over."""
    context = get_context("fork")
    barrier, taken = context.Barrier(4), context.Queue()

    def start() -> None:
        for turn in range(50):
            barrier.wait()
            held = try_lock(tmp_path)
            taken.put((turn, held is not None))
            barrier.wait()
            if held is not None:
                os.close(held)

    processes = [context.Process(target=start) for _ in range(4)]
    for process in processes:
        process.start()
    results = [taken.get(timeout=60) for _ in range(200)]
    for process in processes:
        process.join()
    assert Counter(turn for turn, won in results if won) == Counter(range(50))


def test_a_folder_without_a_lock_is_free(tmp_path: Path) -> None:
    assert not is_locked(tmp_path) and not is_locked(tmp_path / "nowhere")


CONFIG = {"run_dir": "x", "resume": None, "training": {}}


def write_run(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(yaml.safe_dump(CONFIG) if name == "config.yaml" else "theirs")


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "command.txt", "metrics.json", "vae.safetensors", "samples/final.png", "checkpoints/last.ckpt"],
)
def test_a_folder_with_files_that_a_run_would_write_over_is_refused(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, name)
    (tmp_path / name).write_text("theirs: true")
    with pytest.raises(FileExistsError, match=f"{tmp_path}/.* was not written by a run, .* or give another run_dir"):
        Running(tmp_path)


def test_a_folder_with_other_files_or_a_run_that_was_stopped_before_it_saved_is_not(tmp_path: Path) -> None:
    write_run(tmp_path, "slurm.out", "tensorboard/events")
    (tmp_path / "samples").mkdir()
    Running(tmp_path)
    write_run(tmp_path, "config.yaml", "command.txt", "samples/step_000500.png")
    Running(tmp_path)


def test_the_weights_of_a_finished_run_are_not_written_over_by_one_that_begins_anew(tmp_path: Path) -> None:
    write_run(tmp_path, "config.yaml", "unet.safetensors")
    with pytest.raises(FileExistsError, match=r"unet\.safetensors is of a finished run, whose checkpoints are gone"):
        Running(tmp_path, "auto")
    write_run(tmp_path, "checkpoints/last.ckpt")
    Running(tmp_path, "auto")


def test_a_checkpoint_goes_on_in_its_own_run_or_in_a_new_folder_and_in_no_other_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, "config.yaml", "checkpoints/last.ckpt")
    checkpoint = str(tmp_path / "a" / "checkpoints" / "last.ckpt")
    Running(tmp_path / "a", checkpoint)
    Running(tmp_path / "new", checkpoint)
    with pytest.raises(FileExistsError, match=r"b holds a run of its own, but resume=.* is a checkpoint"):
        Running(tmp_path / "b", checkpoint)


def test_a_run_among_its_own_training_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Running(tmp_path / "run", data=tmp_path / "pictures")
    for folder in ("pictures", "pictures/run"):
        with pytest.raises(ValueError, match=r"run_dir .* is in the training data .*, so that its files would be read"):
            Running(tmp_path / folder, data=tmp_path / "pictures")


@pytest.mark.parametrize("callbacks", ["default", "frozen_part"])
def test_a_config_tells_it_the_data_and_the_checkpoint(tmp_path: Path, callbacks: str) -> None:
    write_run(tmp_path / "run", "config.yaml", "checkpoints/last.ckpt")
    given = ["name=test", f"callbacks={callbacks}", f"run_dir={tmp_path / 'run'}"]

    def running(*overrides: str) -> object:
        with initialize_config_dir(str(Path(__file__).parents[3] / "conf"), version_base="1.3"):
            return instantiate(compose("train", [*given, *overrides]).callbacks.running)

    assert isinstance(running("resume=auto"), Running)
    for overrides in (["resume=elsewhere.ckpt"], ["data=folder", f"data.root={tmp_path}"]):
        with pytest.raises(InstantiationException, match=r"holds a run of its own|is in the training data"):
            running(*overrides)
