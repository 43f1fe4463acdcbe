import os
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from ldm.callbacks.checkpointing.run_lock import RunLock
from ldm.files import is_locked, try_lock
from tests.callbacks.tiny import Batches, Tiny, trainer


class Probe(RunLock):
    """Records whether the folder is locked during training."""

    def on_train_start(self, *_: object) -> None:
        self.seen = is_locked(self.folder)


def test_the_run_folder_is_locked_only_while_the_run_trains(tmp_path: Path) -> None:
    probe = Probe(tmp_path)
    trainer(tmp_path, probe).fit(Tiny(), Batches())
    assert probe.seen and not is_locked(tmp_path)


def test_a_failed_run_unlocks_its_folder(tmp_path: Path) -> None:
    class Fails(Tiny):
        def training_step(self, *_: object) -> None:  # type: ignore[override]
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        trainer(tmp_path, RunLock(tmp_path)).fit(Fails(), Batches())
    assert not is_locked(tmp_path)


def test_a_folder_where_another_run_trains_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.callbacks.checkpointing.run_lock.PATIENCE", 0.01)
    inner = pytest.raises(ValueError, match=r"another process is training in .*: wait until it ends, or give another")

    class Second(Tiny):
        def on_train_start(self) -> None:
            with inner:
                trainer(tmp_path, RunLock(tmp_path)).fit(Tiny(), Batches())

    trainer(tmp_path, RunLock(tmp_path)).fit(Second(), Batches())


def test_only_one_of_several_processes_gets_the_lock(tmp_path: Path) -> None:
    """The processes start from a barrier right before each attempt, 50 times."""
    context = get_context("fork")
    barrier, taken = context.Barrier(4), context.Queue()

    def start() -> None:
        for turn in range(50):
            barrier.wait()
            lock = try_lock(tmp_path)
            taken.put((turn, lock is not None))
            barrier.wait()
            if lock is not None:
                os.close(lock)

    processes = [context.Process(target=start) for _ in range(4)]
    for process in processes:
        process.start()
    results = [taken.get(timeout=60) for _ in range(200)]
    for process in processes:
        process.join()
    assert Counter(turn for turn, won in results if won) == Counter(range(50))


def test_a_folder_without_a_lock_file_is_not_locked(tmp_path: Path) -> None:
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
def test_a_folder_with_files_that_a_run_would_overwrite_is_refused(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, name)
    (tmp_path / name).write_text("theirs: true")
    with pytest.raises(FileExistsError, match=f"{tmp_path}/.* was not written by a run, .* or give another run_dir"):
        RunLock(tmp_path)


def test_a_folder_with_unrelated_files_or_a_run_without_checkpoints_is_accepted(tmp_path: Path) -> None:
    write_run(tmp_path, "slurm.out", "tensorboard/events")
    (tmp_path / "samples").mkdir()
    RunLock(tmp_path)
    write_run(tmp_path, "config.yaml", "command.txt", "samples/step_000500.png")
    RunLock(tmp_path)


def test_a_new_run_does_not_overwrite_the_weights_of_a_finished_run(tmp_path: Path) -> None:
    write_run(tmp_path, "config.yaml", "unet.safetensors")
    with pytest.raises(FileExistsError, match=r"unet\.safetensors belongs to a finished run whose checkpoints are"):
        RunLock(tmp_path, "auto")
    write_run(tmp_path, "checkpoints/last.ckpt")
    RunLock(tmp_path, "auto")


def test_a_checkpoint_resumes_in_its_own_folder_or_a_new_one_but_not_in_another_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, "config.yaml", "checkpoints/last.ckpt")
    checkpoint = str(tmp_path / "a" / "checkpoints" / "last.ckpt")
    RunLock(tmp_path / "a", checkpoint)
    RunLock(tmp_path / "new", checkpoint)
    with pytest.raises(FileExistsError, match=r"b already contains a run, but resume=.* is a checkpoint"):
        RunLock(tmp_path / "b", checkpoint)


def test_a_run_folder_inside_the_training_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    RunLock(tmp_path / "run", data=tmp_path / "images")
    for folder in ("images", "images/run"):
        with pytest.raises(ValueError, match=r"run_dir .* is in the training data .*, so that its files would be read"):
            RunLock(tmp_path / folder, data=tmp_path / "images")


@pytest.mark.parametrize("callbacks", ["default", "frozen_part"])
def test_the_configs_pass_the_data_and_the_checkpoint_to_the_lock(tmp_path: Path, callbacks: str) -> None:
    write_run(tmp_path / "run", "config.yaml", "checkpoints/last.ckpt")
    given = ["name=test", f"callbacks={callbacks}", f"run_dir={tmp_path / 'run'}"]

    def running(*overrides: str) -> object:
        with initialize_config_dir(str(Path(__file__).parents[3] / "conf"), version_base="1.3"):
            return instantiate(compose("train", [*given, *overrides]).callbacks.running)

    assert isinstance(running("resume=auto"), RunLock)
    for overrides in (["resume=elsewhere.ckpt"], ["data=folder", f"data.root={tmp_path}"]):
        with pytest.raises(InstantiationException, match=r"already contains a run|is in the training data"):
            running(*overrides)
