"""Tests `lora=` and `embedding=`: sampling, the records in image metadata, and sampling again from a record."""

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.commands.sample import command as sample
from ldm.commands.sample.arguments import parse
from ldm.drawing.keys import KEYS
from ldm.image import read_metadata
from ldm.weights.adapters.writer import write_adapter
from tests.commands.sample.running import error
from tests.tiny import tiny_text_tower, tiny_unet
from tests.weights.adapters.made import changes

PROMPT = "a red zorp"
STEPS = "steps=2"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    made = {"unet": changes(tiny_unet()), "text_encoder": changes(tiny_text_tower())}
    write_adapter(tmp_path / "style.safetensors", made, "kohya", {})
    return tmp_path / "style.safetensors"


@pytest.fixture
def embedding(tmp_path: Path) -> Path:
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": 5 * vectors}, tmp_path / "zorp.safetensors")
    return tmp_path / "zorp.safetensors"


def sampled(out: Path, *argv: str) -> bytes:
    """Samples images and returns the pixels of the first."""
    assert sample.main([*argv, STEPS, f"out={out}"]) == 0
    return Image.open(out / "0000.png").tobytes()


def test_several_files_with_weights_and_tokens_can_be_given() -> None:
    given = parse(["lora=a.safetensors", "lora=b:c.safetensors:-0.5", "embedding=x.pt", "embedding=y.pt:<cat>"]).given
    assert given == {
        "lora": [("a.safetensors", 1.0), ("b:c.safetensors", -0.5)],
        "embedding": [("x.pt", None), ("y.pt", "<cat>")],
    }


@pytest.mark.slow
def test_each_file_changes_the_image_and_is_recorded_with_its_hash(
    model: str, lora: Path, embedding: Path, tmp_path: Path
) -> None:
    plain = sampled(tmp_path / "plain", PROMPT, model)
    assert sampled(tmp_path / "zero", PROMPT, model, f"lora={lora}:0") == plain
    one = sampled(tmp_path / "one", PROMPT, model, f"lora={lora}:0.5")
    both = sampled(tmp_path / "both", PROMPT, model, f"lora={lora}:0.5", f"embedding={embedding}")
    assert len({plain, one, both}) == 3
    metadata = read_metadata(tmp_path / "both" / "0000.png")
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (lora, embedding)]
    assert metadata["lora"] == [{"path": str(lora), "sha256": hashes[0], "weight": 0.5}]
    assert metadata["embedding"] == [{"path": str(embedding), "sha256": hashes[1], "token": "zorp"}]
    assert "lora" not in read_metadata(tmp_path / "plain" / "0000.png")


def test_sampling_again_with_the_recorded_files_is_bit_identical(
    model: str, lora: Path, embedding: Path, tmp_path: Path
) -> None:
    sampled(tmp_path / "a", PROMPT, model, f"lora={lora}:0.5", f"lora={lora}:-0.2", f"embedding={embedding}")
    assert sample.main([f"from={tmp_path / 'a' / '0000.png'}", f"out={tmp_path / 'b'}"]) == 0
    assert (tmp_path / "b" / "0000.png").read_bytes() == (tmp_path / "a" / "0000.png").read_bytes()


def test_given_files_replace_the_recorded_files(model: str, lora: Path, tmp_path: Path) -> None:
    sampled(tmp_path / "a", PROMPT, model, f"lora={lora}:0.5")
    other = sampled(tmp_path / "b", f"from={tmp_path / 'a' / '0000.png'}", f"lora={lora}:1")
    assert other == sampled(tmp_path / "c", PROMPT, model, f"lora={lora}")


@pytest.mark.parametrize("name", ["lora", "embedding"])
def test_the_error_names_a_recorded_file_that_is_missing_or_has_changed(
    name: str, model: str, lora: Path, embedding: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled(tmp_path / "a", PROMPT, model, f"lora={lora}", f"embedding={embedding}")
    file, again = {"lora": lora, "embedding": embedding}[name], f"from={tmp_path / 'a' / '0000.png'}"
    data = file.read_bytes()
    file.unlink()
    message = error(capsys, 1, again, f"out={tmp_path / 'b'}")
    assert (
        f"{file}, the {name} of this image (SHA-256 {hashlib.sha256(data).hexdigest()[:12]}…), is not there" in message
    )
    if name == "lora":
        write_adapter(file, {"unet": changes(tiny_unet(), "attention")}, "kohya", {})
    else:
        save_file({"emb_params": torch.ones(1, 16)}, file)
    assert f"the {name} of this image" in (message := error(capsys, 1, again, f"out={tmp_path / 'b'}"))
    assert "has changed since: put it back" in message


def test_existing_images_sampled_with_other_files_are_refused(
    model: str, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    sampled(out, PROMPT, model, f"lora={lora}:0.5")
    assert "0000.png" in error(capsys, 1, PROMPT, model, STEPS, f"out={out}", f"lora={lora}:0.6")
    assert "0000.png" in error(capsys, 1, PROMPT, model, STEPS, f"out={out}")
    assert sample.main([PROMPT, model, STEPS, f"out={out}", f"lora={lora}:0.5"]) == 0


def test_a_negative_prompt_may_contain_a_token_and_an_unused_one_is_warned_about(
    model: str, embedding: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = []
    for negative, used in (("blue", False), ("ZORP", True)):
        given = f"negative={negative}", f"embedding={embedding}"
        images.append(sampled(tmp_path / negative, "red", model, *given))
        assert ("its token 'zorp' is in no prompt" in capsys.readouterr().err) != used
    assert images[0] != images[1]


def test_a_token_that_exists_is_refused_and_another_can_be_given(
    model: str, embedding: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = embedding.rename(tmp_path / "red.safetensors")
    assert f"such as embedding={file}:<my-red>" in error(capsys, 1, PROMPT, model, STEPS, f"embedding={file}")
    sampled(tmp_path / "a", "a <my-red>", model, f"embedding={file}:<my-red>")
    assert read_metadata(tmp_path / "a" / "0000.png")["embedding"][0]["token"] == "<my-red>"


@pytest.mark.parametrize("weight", ["nan", "inf", "0,5", "strong", ""])
def test_a_weight_that_is_no_number_is_refused(weight: str, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "FILE:WEIGHT with a number" in error(capsys, 2, PROMPT, f"lora={lora}:{weight}")


def test_a_weight_may_have_an_exponent_and_a_file_name_a_colon(lora: Path) -> None:
    assert KEYS["lora"].parse(f"{lora}:5e-1") == (str(lora), 0.5)
    renamed = str(lora.rename(lora.with_name("night:sky.safetensors")))
    assert KEYS["lora"].parse(renamed) == (renamed, 1.0)


@pytest.mark.parametrize("text", ["lora=", "embedding=", "embedding=:x"])
def test_keys_without_a_file_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be a file, or FILE:" in error(capsys, 2, PROMPT, text)


def test_the_error_names_a_given_file_that_does_not_exist(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no adapter nowhere.safetensors" in error(capsys, 1, PROMPT, model, "lora=nowhere.safetensors:0.5")
