import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.commands.sample import command as sample
from ldm.drawing import job as sample_job
from ldm.files import MACHINE
from ldm.image import read_metadata, save_png
from ldm.pipeline.pipeline import Pipeline
from tests.commands.sample.running import error, files

ROOT = Path(__file__).parents[2]


def test_a_killed_job_resumes_and_writes_the_same_files(
    model: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["red", "blue", "n=3", "batch_size=2", "steps=3", "guidance_interval=0.1,9", "device=cpu", model]
    assert sample.main([*argv, f"out={tmp_path / 'complete'}"]) == 0
    shutil.copytree(tmp_path / "complete", out)
    for name in ("0003.png", "0004.png", "0005.png", "grid.png"):  # the second batch has one image left
        (out / name).unlink()
    (out / f".0004.png.{MACHINE}-0a1b2c3d.tmp").write_bytes(b"half")
    sampled, call_pipeline = [], Pipeline.__call__

    def recording_call(self: Pipeline, prompts: list[str], **call: object) -> object:
        sampled.append(prompts)
        return call_pipeline(self, prompts, **call)

    monkeypatch.setattr(Pipeline, "__call__", recording_call)
    capsys.readouterr()
    assert sample.main([*argv, f"out={out}"]) == 0
    assert files(out) == files(tmp_path / "complete") and sampled == [["red", "blue"], ["blue", "blue"]]
    assert "1 of 3 batches are already in" in capsys.readouterr().err
    assert sample.main([*argv, f"out={out}"]) == 0 and len(sampled) == 2


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "32")])
def test_bf16_is_used_where_it_is_fast_and_reproduced_everywhere(
    fast: bool, precision: str, model: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    assert sample.main(["red", "device=cpu", model, f"out={out}"]) == 0
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not fast})
    assert sample.main([f"from={out / '0000.png'}", f"out={out / 'reproduced'}"]) == 0
    assert (out / "reproduced" / "0000.png").read_bytes() == (out / "0000.png").read_bytes()
    assert read_metadata(out / "0000.png")["precision"] == precision


@pytest.mark.parametrize("change", ["steps=2", "seed=1", "negative=blue", "guidance=3", "precision=bf16"])
def test_existing_images_of_another_job_are_refused(
    change: str, model: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["red", model, f"out={out}"]
    assert sample.main([*argv, "precision=32"]) == 0
    changed = {"precision": "32"} | dict([change.split("=")])
    message = error(capsys, 1, *argv, *map("=".join, changed.items()))
    assert re.search(rf"which is not an image of this job \(it has .*{change.partition('=')[0]}=", message)


@pytest.mark.slow
def test_several_processes_share_a_job_and_write_the_same_files(model: str, tmp_path: Path) -> None:
    argv = ["red", "blue", "white", "n=2", "batch_size=2", "steps=1", "device=cpu", model]
    assert sample.main([*argv, f"out={tmp_path / 'one'}"]) == 0
    command = [sys.executable, "sample.py", *argv, f"out={tmp_path / 'two'}"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environments = [{"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank} for rank in "01"]  # as torchrun sets them
    started = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | threads | environment, stdout=subprocess.PIPE, text=True)
        for environment in environments
    ]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert [text.count(f"{tmp_path / 'two'}{os.sep}0") for text in printed] == [4, 2]
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_several_processes_need_out(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "give out=" in error(capsys, 2, "red", model)


def test_files_written_by_other_programs_are_never_overwritten(
    model: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir()
    (out / "0001.png").write_bytes(b"mine")
    message = error(capsys, 1, "red", "blue", model, f"out={out}")
    assert "already holds 0001.png, which is not an image of this job: give another out=" in message
    assert (out / "0001.png").read_bytes() == b"mine"


def test_only_gifs_written_by_ldm_are_overwritten(model: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["red", "blue", "steps=1", "preview=gif", model, f"out={out}"]
    out.mkdir()
    Image.new("L", (4, 4)).save(out / "0001.gif")
    before = files(out)
    assert "already holds 0001.gif, which sample.py did not write" in error(capsys, 1, *argv)
    assert files(out) == before
    (out / "0001.gif").unlink()
    assert sample.main(argv) == 0
    (out / "0001.png").unlink()
    assert sample.main(argv) == 0  # samples both again


@pytest.mark.parametrize("name", ["0000.png", "grid.png"])
def test_a_source_image_is_not_overwritten(
    name: str, model: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir()
    save_png(Image.new("RGB", (16, 16)), out / name, {"grid": 1})
    before = files(out)
    message = error(capsys, 1, "red", "steps=2", model, f"init={out / name}", f"out={out}")
    assert f"init={out / name} is a file that this job would write: give another out=" in message
    assert files(out) == before


def test_an_image_written_by_another_process_meanwhile_is_kept(
    model: str, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call_pipeline = Pipeline.__call__

    def write_first(self: Pipeline, prompts: list[str], **call: object) -> object:
        out.mkdir()
        (out / "0000.png").write_bytes(b"theirs")
        return call_pipeline(self, prompts, **call)

    monkeypatch.setattr(Pipeline, "__call__", write_first)
    message = error(capsys, 1, "red", "steps=1", model, f"out={out}")
    assert f"another process wrote {out / '0000.png'} in the meantime" in message
    assert files(out) == {"0000.png": b"theirs"}


def test_the_grid_shows_the_first_images(model: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_job, "MAX_GRID_IMAGES", 2)
    assert sample.main(["red", "n=3", "steps=1", model, f"out={out}"]) == 0
    assert read_metadata(out / "grid.png") == {"grid": 2}


def test_ctrl_c_keeps_the_finished_images(
    model: str, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call_pipeline = Pipeline.__call__

    def interrupted(self: Pipeline, prompts: list[str], **call: object) -> object:
        if prompts == ["blue"]:
            raise KeyboardInterrupt
        return call_pipeline(self, prompts, **call)

    monkeypatch.setattr(Pipeline, "__call__", interrupted)
    assert sample.main(["red", "blue", "white", "batch_size=1", "steps=1", model, f"out={out}"]) == 130
    assert [file.name for file in out.iterdir()] == ["0000.png"]
    assert f"stopped: 1 of 3 images are in {out}" in capsys.readouterr().err
