from pathlib import Path

import pytest
import torch

from ldm.__main__ import main
from ldm.weights.contents import open_contents
from ldm.weights.convert import write
from tests.weights.foreign import ODD, SD2, full_model, networks, same, without_metadata


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write(full_model(ODD), tmp_path / "m.safetensors", "single")
    return tmp_path / "m.safetensors"


def test_the_format_follows_from_the_destination_unless_an_option_sets_it(tmp_path: Path, model: Path) -> None:
    assert main(["convert", str(model), str(tmp_path / "folder")]) == 0
    assert (tmp_path / "folder" / "model_index.json").is_file()
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "m.ckpt")]) == 0
    assert main(["convert", str(tmp_path / "m.ckpt"), str(tmp_path / "own"), "--to", "ldm"]) == 0
    assert {file.stem for file in (tmp_path / "own").glob("*.safetensors")} == {"unet", "vae", "text_tower"}


def test_one_network_of_a_model_is_converted_to_half_precision(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "vae.safetensors"
    assert main(["convert", str(model), str(path), "--part", "vae", "--dtype", "float16"]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    expected = {name: t.half() for name, t in networks(ODD)["vae"].state_dict().items()}
    assert same(open_contents(path).network("vae").load(None).state_dict(), expected)


def test_shards_have_at_most_the_given_size(tmp_path: Path, model: Path) -> None:
    assert main(["convert", str(model), str(tmp_path / "folder"), "--shard", "1MB"]) == 0
    assert list((tmp_path / "folder" / "unet").glob("*.index.json")) == []  # less than 1 MB, so one file
    assert main(["convert", str(model), str(tmp_path / "more"), "--shard", "50000"]) == 0
    assert len(list((tmp_path / "more" / "unet").glob("*.safetensors"))) > 3


@pytest.mark.parametrize("size", ["0", "2 miles", "-1", "1.5GB"])
def test_an_invalid_size_is_a_usage_error(model: Path, capsys: pytest.CaptureFixture, size: str) -> None:
    assert main(["convert", str(model), "folder", f"--shard={size}"]) == 2
    assert "must be a size such as 500MB or 2GB" in capsys.readouterr().err


def test_failures_print_one_sentence_and_exit_with_1(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 1
    (tmp_path / "x").mkdir()
    assert main(["convert", str(model), str(tmp_path / "x")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "there is no model" in errors[0] and "already exists" in errors[1]


def test_the_prediction_of_sd2_can_be_set(tmp_path: Path) -> None:
    write(full_model(SD2), tmp_path / "m.safetensors", "single")
    without_metadata(tmp_path / "m.safetensors")
    arguments = ["convert", str(tmp_path / "m.safetensors"), str(tmp_path / "eps.safetensors")]
    assert main([*arguments, "--prediction", "eps"]) == 0
    assert open_contents(tmp_path / "eps.safetensors").model["prediction"] == "eps"
    assert torch.is_tensor(open_contents(tmp_path / "eps.safetensors").network("unet").load().conv_in.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "destination, option, message",
    [
        ("x.safetensors", "--shard=1MB", "--shard splits the files of a diffusers folder"),
        ("own", "--to=ldm --shard=1MB", "--shard splits the files of a diffusers folder"),
        ("x", "--variant=fp16", "--variant selects files of a diffusers folder"),
    ],
)
def test_an_option_without_effect_is_a_usage_error(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture, destination: str, option: str, message: str
) -> None:
    assert main(["convert", str(model), str(tmp_path / destination), *option.split()]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_prediction_of_a_diffusers_folder_cannot_be_set(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture
) -> None:
    write(full_model(ODD), tmp_path / "folder", "diffusers")
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "x"), "--prediction", "v"]) == 2
    assert "--prediction is for single files of Stable Diffusion" in capsys.readouterr().err


def test_an_abbreviated_option_is_refused(model: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["convert", str(model), "x", "--dtyp", "float16"])
    assert "unrecognized argument --dtyp; did you mean --dtype?" in capsys.readouterr().err
