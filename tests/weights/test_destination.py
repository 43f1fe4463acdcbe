"""Tests of what `ldm convert --overwrite` replaces and what it refuses to replace."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.__main__ import main
from ldm.callbacks.checkpointing.checkpoint_file import write as write_checkpoint
from ldm.data.latents.shard import write_shard
from ldm.weights.contents import open_contents
from ldm.weights.convert import part, verified, write
from tests.tiny import save_tiny_model
from tests.weights.foreign import ODD, full_model

FORMS = {"m": "diffusers", "own": "ldm"}


def everything(folder: Path) -> dict[str, bytes | str | None]:
    """Returns everything below a folder by path: a file's bytes, a link's target, None for a folder."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a single file to convert, source.safetensors, and its conversion, m."""
    folder = tmp_path_factory.mktemp("written")
    write(full_model(ODD), folder / "source.safetensors", "single")
    assert main(["convert", str(folder / "source.safetensors"), str(folder / "m")]) == 0
    return folder


@pytest.fixture
def model(tmp_path: Path, written: Path) -> Path:
    """A single file to convert."""
    return Path(shutil.copy(written / "source.safetensors", tmp_path))


def replaced(model: Path, path: Path, *options: str) -> int:
    return main(["convert", str(model), str(path), "--overwrite", *options])


def edit_config(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{}")


def edit_weights(folder: Path) -> None:
    """Rewrites the weights as another tool would that copies the metadata of ldm."""
    [file] = folder.rglob("unet/*.safetensors")
    save_file(load_file(file), file, {"ldm": '{"kind": "unet", "config": {}}'})


def link(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").symlink_to(folder / "unet" / "config.json")


ADDITIONS: dict[str, Callable[[Path], object]] = {
    "a.safetensors": lambda folder: save_file({"a": torch.zeros(1)}, folder / "a.safetensors"),
    "own.safetensors": lambda folder: write(part(full_model(ODD), "vae"), folder / "own.safetensors", "ldm"),
    "unet/notes.txt": lambda folder: (folder / "unet" / "notes.txt").write_text("mine"),
    ".hidden": lambda folder: (folder / ".hidden").touch(),
    "unet/empty": lambda folder: (folder / "unet" / "empty").mkdir(),
    "linked": lambda folder: (folder / "linked").symlink_to(folder.parent),
    "vae/config.json": link,
    "unet/config.json": edit_config,
    "unet/diffusion_pytorch_model.safetensors": edit_weights,
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_a_folder_with_anything_that_no_conversion_wrote_is_kept(
    tmp_path: Path, model: Path, written: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(written / "m", tmp_path / "m")
    ADDITIONS[name](tmp_path / "m")
    before = everything(tmp_path)
    for to in ("diffusers", "ldm"):
        assert replaced(model, tmp_path / "m", "--to", to) == 1
        message = capsys.readouterr().err
        assert f"error: {tmp_path}/m/{name} was not written by a conversion, or was changed since" in message
        assert "move it away, or give another name" in message
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", FORMS)
def test_a_folder_that_a_conversion_wrote_is_replaced_even_after_a_move(tmp_path: Path, model: Path, name: str) -> None:
    assert main(["convert", str(model), str(tmp_path / name), "--to", FORMS[name]]) == 0
    (tmp_path / name).rename(tmp_path / "moved")
    before = everything(tmp_path / "moved")
    assert replaced(model, tmp_path / "moved", "--to", FORMS[name], "--dtype", "float16") == 0
    after = everything(tmp_path / "moved")
    assert after.keys() == before.keys() and after != before and open_contents(tmp_path / "moved").networks


def test_without_a_record_only_files_in_the_own_format_are_replaced(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, to in FORMS.items():
        assert main(["convert", str(model), str(tmp_path / name), "--to", to]) == 0
        (tmp_path / name / ".ldm_convert.json").unlink()  # earlier versions did not write it
    assert replaced(model, tmp_path / "own", "--to", "ldm") == 0
    assert replaced(model, tmp_path / "m") == 1 and "was not written by a conversion" in capsys.readouterr().err
    (tmp_path / "own" / ".ldm_convert.json").unlink()
    write(part(full_model(ODD), "vae"), tmp_path / "own" / "another.safetensors", "ldm")
    assert replaced(model, tmp_path / "own") == 1 and "another.safetensors was not" in capsys.readouterr().err


def foreign_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path.with_suffix(".safetensors"))


def pickled(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path.with_suffix(".ckpt"))


def checkpoint(path: Path) -> None:
    write_checkpoint(path.with_suffix(".ckpt"), {"state_dict": {}, "ldm": {"kind": "unet", "config": {}, "model": {}}})


def latents(path: Path) -> None:
    record = {"settings": {}, "source": {}}
    write_shard(path.with_suffix(".safetensors"), np.zeros((1, 8, 2, 2), np.float16), ["k"], [["c"]], record)


def linked(path: Path) -> None:
    write(part(full_model(ODD), "vae"), path.with_name("real.safetensors"), "single")
    path.with_suffix(".safetensors").symlink_to(path.with_name("real.safetensors"))


def dangling(path: Path) -> None:
    path.with_suffix(".safetensors").symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("make", [foreign_safetensors, pickled, checkpoint, latents, linked, dangling])
def test_a_file_that_no_conversion_wrote_is_kept(
    tmp_path: Path, model: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "foreign")
    [path] = tmp_path.glob("foreign.*")
    before = everything(tmp_path)
    assert replaced(model, path) == 1
    assert f"error: {path} was not written by a conversion" in capsys.readouterr().err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "vae.safetensors"])
def test_a_file_that_a_conversion_wrote_is_replaced(tmp_path: Path, model: Path, name: str) -> None:
    options = ["--part", "vae", "--to", "ldm"] if name.startswith("vae") else []
    for dtype in ("float32", "float16"):
        assert replaced(model, tmp_path / name, "--dtype", dtype, *options) == 0
    assert {t.dtype for t in open_contents(tmp_path / name).network("vae").load(None).parameters()} == {torch.float16}


@pytest.mark.parametrize("overwrite", [True, False])
def test_files_created_at_the_destination_during_a_conversion_are_kept(
    tmp_path: Path, model: Path, overwrite: bool
) -> None:
    path, notes = tmp_path / "m", tmp_path / "m" / "notes.txt"
    if overwrite:
        write(open_contents(model), path, "diffusers")

    def on_read(count: int) -> None:
        path.mkdir(exist_ok=True)
        notes.write_text("mine")

    with pytest.raises(FileExistsError, match=r"notes\.txt was not written|m already exists"):
        write(verified(open_contents(model), on_read=on_read), path, "diffusers", overwrite=overwrite)
    assert notes.read_text() == "mine" and not list(tmp_path.glob(".m*"))


def test_a_destination_that_is_contains_or_is_in_the_source_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(model), str(tmp_path / "sd")]) == 0
    (tmp_path / "link").symlink_to("sd")
    os.link(model, tmp_path / "twin.safetensors")
    monkeypatch.chdir(tmp_path / "sd")
    before = everything(tmp_path)
    for source, destination, how in (
        ("../sd/unet", "../sd", "contains"),
        ("unet", ".", "contains"),
        ("../link/unet", "../sd", "contains"),
        ("unet", "vae/..", "contains"),
        ("unet/diffusion_pytorch_model.safetensors", "unet", "contains"),
        ("../sd", "../link", "is"),
        ("../sd", ".", "is"),
        ("..//source.safetensors", "../source.safetensors", "is"),
        ("../source.safetensors", "../twin.safetensors", "is"),
        ("../sd", "../sd/unet", "is in"),
        ("../link", "new.safetensors", "is in"),
    ):
        assert main(["convert", source, destination, "--overwrite"]) == 1, (source, destination)
        assert f"error: the destination {Path(destination)} {how} the source" in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_frozen_parts_that_a_model_only_names_count_as_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "parts").mkdir()
    model = save_tiny_model(tmp_path / "parts")
    model.rename(tmp_path / "unet.safetensors")
    before = everything(tmp_path)
    for options in ([], ["--part", "unet"]):
        assert replaced(tmp_path / "unet.safetensors", tmp_path / "parts", "--to", "ldm", *options) == 1
        assert f"the destination {tmp_path}/parts contains the source {tmp_path}/parts/" in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_a_folder_is_restored_after_a_kill_while_it_was_being_replaced(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(model), str(tmp_path / "m")]) == 0
    before = everything(tmp_path)
    (tmp_path / "m").rename(tmp_path / ".m.01234567.old")
    shutil.copytree(tmp_path / ".m.01234567.old", tmp_path / ".m.01234567.tmp")
    (tmp_path / ".m.01234567.lock").touch()
    assert main(["convert", str(model), str(tmp_path / "m")]) == 1
    assert "already exists; give another name, or --overwrite" in capsys.readouterr().err
    assert everything(tmp_path) == before
