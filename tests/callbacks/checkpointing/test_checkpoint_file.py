import os
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile

import pytest
import torch

from ldm.callbacks.checkpointing import checkpoint_file

STATE = {"weights": torch.arange(1000.0), "step": 7}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_written_checkpoint_can_be_read(tmp_path: Path) -> None:
    checkpoint_file.write(tmp_path / "a.ckpt", STATE)
    read = checkpoint_file.read(tmp_path / "a.ckpt")
    assert torch.equal(read["weights"], STATE["weights"]) and read["step"] == 7


@pytest.mark.parametrize("position", [1000, 2000, 3000, 4000])
def test_one_flipped_bit_in_the_weights_is_detected(tmp_path: Path, position: int) -> None:
    checkpoint_file.write(tmp_path / "a.ckpt", STATE)
    flip(tmp_path / "a.ckpt", position)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        checkpoint_file.read(tmp_path / "a.ckpt")


@pytest.mark.parametrize("kept", [0, 100, 1200])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, kept: int) -> None:
    checkpoint_file.write(tmp_path / "last.ckpt", STATE)
    os.truncate(tmp_path / "last.ckpt", kept)
    with pytest.raises(ValueError, match=r"last\.ckpt is not a checkpoint, is truncated"):
        checkpoint_file.read(tmp_path / "last.ckpt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Path("a")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt is not a checkpoint.*more than plain data"):
        checkpoint_file.read(tmp_path / "evil.ckpt")


def test_the_error_for_a_missing_checkpoint_names_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none\.ckpt"):
        checkpoint_file.read(tmp_path / "none.ckpt")


def write_three(folder: Path) -> list[Path]:
    """Writes checkpoints of steps 1 to 3, and last.ckpt as a link to the newest."""
    files = [folder / f"step_{n:08}.ckpt" for n in (1, 2, 3)]
    for n, file in enumerate(files):
        checkpoint_file.write(file, STATE)
        os.utime(file, (n, n))
    (folder / "last.ckpt").hardlink_to(files[-1])
    return files


def test_the_newest_checkpoint_is_last_ckpt(tmp_path: Path) -> None:
    write_three(tmp_path)
    assert checkpoint_file.newest(tmp_path) == tmp_path / "last.ckpt"


def test_the_newest_checkpoint_has_the_last_step_regardless_of_file_times(tmp_path: Path) -> None:
    files = write_three(tmp_path)
    os.utime(files[0], (9e9, 9e9))  # a copy, a restore, or a clock that is ahead
    assert checkpoint_file.newest(tmp_path) == tmp_path / "last.ckpt"
    checkpoint_file.write(tmp_path / "last.ckpt", STATE | {"global_step": 2})  # an older copy
    assert checkpoint_file.newest(tmp_path) == files[2]


def test_a_checkpoint_renamed_by_the_user_is_not_taken_for_the_newest(tmp_path: Path) -> None:
    files = write_three(tmp_path)
    copy = tmp_path / "step_00000001_best.ckpt"
    copyfile(files[0], copy)
    assert checkpoint_file.newest(tmp_path) == tmp_path / "last.ckpt"
    for file in (*files, tmp_path / "last.ckpt"):
        file.unlink()
    with pytest.raises(ValueError, match=f"no checkpoint in .* has a name that a run writes: give resume={copy}"):
        checkpoint_file.newest(tmp_path)


def test_a_corrupt_newest_checkpoint_falls_back_to_the_previous_with_one_warning(tmp_path: Path) -> None:
    files = write_three(tmp_path)
    flip(files[-1], 2000)
    with pytest.warns(UserWarning, match=r"last\.ckpt is corrupt .*trying the previous one") as caught:
        assert checkpoint_file.newest(tmp_path) == files[1]
    assert len(caught) == 1


UNUSABLE = {
    "a broken link": lambda file: file.symlink_to("moved-away.ckpt"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a folder": Path.mkdir,
    "an empty file": Path.touch,
    "a tensor": lambda file: torch.save(torch.ones(2), file),
    "a list": lambda file: torch.save([1, 2], file),
}


@pytest.mark.parametrize("name", ["last.ckpt", "step_00000009.ckpt"])
@pytest.mark.parametrize("make", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_something_else_with_the_name_of_a_checkpoint_is_skipped(
    tmp_path: Path, name: str, make: Callable[[Path], object]
) -> None:
    files = write_three(tmp_path)
    (tmp_path / "last.ckpt").unlink()
    make(tmp_path / name)
    with pytest.warns(UserWarning, match=f"{name} is corrupt .*trying the previous one"):
        assert checkpoint_file.newest(tmp_path) == files[-1]


def test_an_error_says_what_to_do_if_all_checkpoints_are_corrupt(tmp_path: Path) -> None:
    for file in write_three(tmp_path):
        os.truncate(file, 1000)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"every checkpoint in .* is corrupt: give resume="):
        checkpoint_file.newest(tmp_path)


def test_a_missing_folder_has_no_newest_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_file.newest(tmp_path / "none") is None
