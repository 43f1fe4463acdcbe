import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.ownership import Record, check_outside, is_within

BOTH = {"a.txt": b"a", "b.txt": b"b"}


def test_links_and_relative_paths_are_resolved_to_tell_if_a_path_is_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sd" / "unet").mkdir(parents=True)
    (tmp_path / "link").symlink_to("sd")
    (tmp_path / "sd" / "out").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for inner in ("sd", "sd/unet", "sd/new/deeper", "link/unet", "sd/unet/..", str(tmp_path / "sd" / "x"), "sd/out"):
        assert is_within(Path(inner), Path("sd")) and is_within(Path(inner), Path("link")), inner
    for outer in (".", "sd2", "sd/..", "sd/../new", "sd/out/new", "sd/unet/../../x"):
        assert not is_within(Path(outer), Path("sd")), outer
    assert not is_within(Path("nowhere/x"), Path("nowhere"))


def test_a_hard_link_counts_as_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.link(tmp_path / "a", tmp_path / "b")
    assert is_within(tmp_path / "b", tmp_path / "a") and not is_within(tmp_path / "c", tmp_path / "a")


def test_an_output_inside_the_input_is_refused(tmp_path: Path) -> None:
    check_outside(tmp_path / "out", tmp_path / "in", "--out", "input")
    with pytest.raises(
        ValueError, match=rf"^--out {tmp_path}/out is in the input {tmp_path}, so that .* read as input"
    ):
        check_outside(tmp_path / "out", tmp_path, "--out", "input")


def test_a_command_may_overwrite_files_that_it_wrote(tmp_path: Path) -> None:
    Record(tmp_path, "compare").write(BOTH)
    Record(tmp_path, "compare").write({"b.txt": b"new", "sub/c.txt": b"c"})
    Record(tmp_path, "compare").write({"a.txt": b"again"})
    found = {path.name: path.read_bytes() for path in tmp_path.rglob("*.txt")}
    assert found == {"a.txt": b"again", "b.txt": b"new", "c.txt": b"c"}


def state(folder: Path) -> dict[str, bytes | str]:
    """Returns the bytes of every file, and "link" or "folder" for other entries."""
    kinds = {path: "link" if path.is_symlink() else "folder" if path.is_dir() else None for path in folder.iterdir()}
    return {path.name: kind or path.read_bytes() for path, kind in kinds.items()}


def by_another_command(path: Path) -> None:
    Record(path.parent, "convert").write({path.name: b"a"})


def with_a_damaged_record(path: Path) -> None:
    Record(path.parent, "compare").write({path.name: b"a"})
    Record(path.parent, "compare").file.write_text("{")


def changed(path: Path) -> None:
    Record(path.parent, "compare").write({path.name: b"a"})
    path.write_bytes(b"b")


def linked(path: Path) -> None:
    Record(path.parent, "compare").write({path.name: b"a"})
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "make", [by_another_command, with_a_damaged_record, changed, linked, dangling, Path.touch, Path.mkdir]
)
def test_a_file_that_the_command_did_not_write_is_kept(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.txt")
    before = state(tmp_path)
    with pytest.raises(FileExistsError, match=r"a\.txt was not written by ldm compare, or was changed since"):
        Record(tmp_path, "compare").write({"new.txt": b"x", "a.txt": b"a"})
    assert state(tmp_path) == before


def test_files_stay_known_after_a_process_was_killed_while_writing(tmp_path: Path) -> None:
    writer = Record(tmp_path, "compare")
    writer.write(BOTH)
    for content in (b"second", b"third"):  # two processes killed between the record and the first file
        writer.write(BOTH | {"a.txt": content})
        (tmp_path / "a.txt").write_bytes(b"a")
    writer.write({"a.txt": b"fourth"})
    assert (tmp_path / "a.txt").read_bytes() == b"fourth"


def test_the_record_lists_every_file_below_its_folder(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    record = Record(tmp_path, "convert")
    record.write_all()
    assert json.loads(record.file.read_text())["files"].keys() == {"a.txt", "sub/b.txt"}
    assert record.foreign([tmp_path / "a.txt", tmp_path / "sub" / "b.txt", tmp_path / "nowhere"]) == []
