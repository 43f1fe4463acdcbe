import os
from pathlib import Path
from shutil import copyfile

import pytest
import torch

from ldm.callbacks.checkpointing import checkpoint_file

STATE = {"weights": torch.arange(1000.0), "step": 7}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    checkpoint_file.write(tmp_path / "a.ckpt", STATE)
    read = checkpoint_file.read(tmp_path / "a.ckpt")
    assert torch.equal(read["weights"], STATE["weights"]) and read["step"] == 7


@pytest.mark.parametrize("place", [1000, 2000, 3000, 4000])
def test_one_flipped_bit_among_the_weights_is_noticed(tmp_path: Path, place: int) -> None:
    checkpoint_file.write(tmp_path / "a.ckpt", STATE)
    flip(tmp_path / "a.ckpt", place)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint_file.read(tmp_path / "a.ckpt")


@pytest.mark.parametrize("kept", [0, 100, 1200])
def test_a_checkpoint_that_was_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    checkpoint_file.write(tmp_path / "last.ckpt", STATE)
    os.truncate(tmp_path / "last.ckpt", kept)
    with pytest.raises(ValueError, match=r"last\.ckpt is no checkpoint, is cut short"):
        checkpoint_file.read(tmp_path / "last.ckpt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Path("a")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt is no checkpoint.*more than plain data"):
        checkpoint_file.read(tmp_path / "evil.ckpt")


def test_a_missing_checkpoint_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none\.ckpt"):
        checkpoint_file.read(tmp_path / "none.ckpt")


def three(folder: Path) -> list[Path]:
    """Checkpoints of steps 1 to 3, the newest with its second name."""
    files = [folder / f"step_{n:08}.ckpt" for n in (1, 2, 3)]
    for n, file in enumerate(files):
        checkpoint_file.write(file, STATE)
        os.utime(file, (n, n))
    (folder / "last.ckpt").hardlink_to(files[-1])
    return files


def test_the_newest_is_the_last(tmp_path: Path) -> None:
    three(tmp_path)
    assert checkpoint_file.newest(tmp_path) == tmp_path / "last.ckpt"


def test_a_copy_that_the_user_named_is_not_taken_for_the_newest(tmp_path: Path) -> None:
    files = three(tmp_path)
    copy = tmp_path / "step_00000001_best.ckpt"
    copyfile(files[0], copy)
    assert checkpoint_file.newest(tmp_path) == tmp_path / "last.ckpt"
    for file in (*files, tmp_path / "last.ckpt"):
        file.unlink()
    with pytest.raises(ValueError, match=f"holds no checkpoint under a name that a run gives it; give resume={copy}"):
        checkpoint_file.newest(tmp_path)


def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so_once(tmp_path: Path) -> None:
    files = three(tmp_path)
    flip(files[-1], 2000)
    with pytest.warns(UserWarning, match=r"last\.ckpt IS DAMAGED .*trying the one before") as told:
        assert checkpoint_file.newest(tmp_path) == files[1]
    assert len(told) == 1


def test_if_all_are_damaged_it_says_what_to_do(tmp_path: Path) -> None:
    for file in three(tmp_path):
        os.truncate(file, 1000)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"every checkpoint in .* is damaged; give resume="):
        checkpoint_file.newest(tmp_path)


def test_a_folder_that_is_not_there_holds_none(tmp_path: Path) -> None:
    assert checkpoint_file.newest(tmp_path / "none") is None
